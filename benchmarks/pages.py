"""Pages whose tables a tool writes, between two lines that stay."""


def replace_part(page: str, name: str, text: str) -> str:
    """Return a page with other text in one of its parts.

    Args:
        page (str): In Markdown.
        name (str): Of the part, which lies between ``<!-- begin: NAME -->`` and ``<!-- end -->``.
        text (str): Of the part from now on.

    Raises:
        ValueError: The page has no such lines.
    """
    begin, end = f'<!-- begin: {name} -->', '<!-- end -->'
    before, found, rest = page.partition(begin)
    _, also_found, after = rest.partition(end)
    if not (found and also_found):
        raise ValueError(f'The page has to have the lines {begin} and {end}')
    return f'{before}{begin}\n\n{text}\n\n{end}{after}'
