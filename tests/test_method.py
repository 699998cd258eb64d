"""What docs/method.md says is in the code is there."""

import re

import pytest
from tiny_config import ROOT

OPS = ROOT / 'ubn_det/ops'
FILES = {
    'ops/reference.py': [*OPS.glob('*.py')],
    'ops/cpu/': [*OPS.glob('cpu/*.*')],
    'ops/triton_kernels.py': [OPS / 'triton_kernels.py'],
}


def rows():
    page = (ROOT / 'docs/method.md').read_text()
    table = page.partition('| formula |')[2].partition('\n\n')[0]
    return [[cell.strip() for cell in row.split(' | ')] for row in table.splitlines()[2:]]


@pytest.mark.parametrize('row', rows(), ids=lambda row: row[0].strip('| '))
def test_functions_of_the_table_are_in_their_files(row):
    assert len(row) == 1 + len(FILES)
    for cell, files in zip(row[1:], FILES.values(), strict=True):
        names = re.findall('`([^`]+)`', cell)
        assert names or cell.strip(' |') in ('autograd', 'the same')
        for name in names:
            if '.' in name:
                assert any(file.name == name.rpartition('/')[2] for file in files), name
            else:
                defined = re.compile(rf'(?:def|class|struct|[\w>]) [*]?{name}[ (:{{]')
                assert any(defined.search(file.read_text()) for file in files), name


def test_every_file_that_the_page_names_is_there():
    page = (ROOT / 'docs/method.md').read_text()
    named = re.findall(r'`((?:ops|layers)/[\w/.]+)`', page)
    named += [f'ops/cpu/{name}' for name in re.findall(r'`(\w+\.(?:inc|cpp|h))`', page)]
    assert named
    assert [name for name in named if not (ROOT / 'ubn_det' / name).exists()] == []
