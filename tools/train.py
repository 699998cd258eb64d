"""Train a detector: mmdet's training tool with UBN registered and checked at the start."""

import argparse
import os
import sys

from mmdet.utils import setup_cache_size_limit_of_dynamo

from ubn_det.datasets import InputError, check_data
from ubn_det.engine import add_arguments, build_runner, finish, load_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train a detector')
    parser.add_argument('config', help='config file')
    parser.add_argument('--amp', action='store_true', help='train in mixed precision (GPU)')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate with the batch size'
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='go on from the given checkpoint; without one, from the latest in the work folder',
    )
    add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    setup_cache_size_limit_of_dynamo()
    cfg = load_config(args)
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
    if args.auto_scale_lr:
        if not {'enable', 'base_batch_size'} <= set(cfg.get('auto_scale_lr', {})):
            raise ValueError('--auto-scale-lr needs auto_scale_lr.base_batch_size in the config')
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    elif int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', 0)) > 0:
        raise ValueError(
            '--max-restarts of torchrun (MAX_RESTARTS of dist_train.sh) needs --resume: without '
            'it each restart would begin anew and overwrite what is there'
        )
    try:
        check_data(cfg, ('train', 'val'))
    except InputError as error:
        sys.exit(f'train.py: error: {error}')
    build_runner(cfg, None if args.resume is None else 'resume').train()
    finish()


if __name__ == '__main__':
    main()
