"""Draw the demo data set: shapes in COCO instance format, in a few seconds.

A second call with the same settings finds the data set complete and leaves it as it is.
"""

import argparse

from generated import SIDE_RANGE, generate_coco


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or a list of arguments in its place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', help='directory of the data set, made if missing')
    parser.add_argument('--num-train', type=int, default=240, help='number of training images')
    parser.add_argument('--num-val', type=int, default=60, help='number of validation images')
    parser.add_argument(
        '--side-range',
        type=int,
        nargs=2,
        metavar=('MIN', 'MAX'),
        default=SIDE_RANGE,
        help='smallest and largest height and width of an image in pixels',
    )
    parser.add_argument('--seed', type=int, default=0, help='seed of the whole data set')
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> None:
    """Generate the data set and say what was done."""
    args = parse_args(args)
    try:
        written = generate_coco(
            args.out, args.num_train, args.num_val, tuple(args.side_range), args.seed
        )
    except (ValueError, FileExistsError) as error:
        raise SystemExit(f'error: {error}') from None
    counts = f'{args.num_train} training and {args.num_val} validation images, seed {args.seed}'
    print(f'{args.out}: {"wrote" if written else "already has"} {counts}')


if __name__ == '__main__':
    main()
