"""Refuse a torch that is too old, before anything of it is missed."""

import re

import torch

# torch.compiler.is_exporting came with 2.7, and with 2.8 what tells activation checkpointing from
# a plain forward. setup.py reads the line.
MINIMUM_TORCH = '2.8'


def check(version: str) -> None:
    """Raise an error where a version of torch is too old for this package.

    Args:
        version (str): As in ``torch.__version__``.

    Raises:
        ImportError: It is.
    """

    def numbers(text: str) -> list[int]:
        return [int(number) for number in re.findall(r'\d+', text)[:2]]

    if numbers(version) < numbers(MINIMUM_TORCH):
        raise ImportError(
            f'ubn_det needs torch {MINIMUM_TORCH} or newer, and this is torch {version}: install '
            'a newer one, and mmcv compiled against it'
        )


check(torch.__version__)
