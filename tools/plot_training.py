"""Plot loss, mAP and the condensation of every layer over a training run."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use('Agg')

from ubn_det.visualization import plot_training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('work_dir', type=Path, help='work folder of the run')
    parser.add_argument('--out', type=Path, help='image file; WORK_DIR/training.png by default')
    args = parser.parse_args()
    out = args.out or args.work_dir / 'training.png'
    plot_training(args.work_dir, out)
    print(f'wrote {out}')


if __name__ == '__main__':
    main()
