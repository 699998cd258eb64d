"""The packages of requirements.txt's section [extra], for the tests that need them.

They lie in a folder that is not on Python's path, since mmcv and mmdet import torchvision wherever
they find it and behave differently then. A test takes the fixture ``extra_packages`` of
conftest.py and imports within the test; a process of its own calls :func:`enable` first.
"""

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

FOLDER = Path(sys.prefix) / 'extra'

# What was imported from the folder: much of it registers operators and cannot be imported twice.
_modules: dict[str, ModuleType] = {}


@functools.cache
def _declare_operators() -> None:
    """Declare what torchvision expects of its library where the library cannot be loaded.

    Its wheel is compiled against a CUDA build of torch.
    """
    library = next((FOLDER / 'torchvision').glob('_C*.so'))
    try:
        torch.ops.load_library(library)
    except OSError:
        for name in ('nms', 'qnms'):
            torch.library.define(
                f'torchvision::{name}',
                '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
            )


def enable() -> None:
    """Make the packages importable in this process.

    Raises:
        ModuleNotFoundError: The folder is not there.
    """
    if not FOLDER.is_dir():
        raise ModuleNotFoundError(f'{FOLDER} is not there: `make setup` makes it')
    _declare_operators()
    sys.path.append(str(FOLDER))
    sys.modules.update(_modules)
    importlib.invalidate_caches()


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """Make the packages importable, and afterwards as absent as before.

    What is first imported within and lies elsewhere stays: import mmcv and mmdet before.
    """
    enable()
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
        _modules.update((n, m) for n, m in sys.modules.items() if _lies_in_folder(m))
        for name in _modules:
            sys.modules.pop(name, None)
        importlib.invalidate_caches()


def _lies_in_folder(module: ModuleType) -> bool:
    spec = getattr(module, '__spec__', None)
    places = [
        getattr(spec, 'origin', None),
        *(getattr(spec, 'submodule_search_locations', 0) or []),
    ]
    return any(place and Path(place).is_relative_to(FOLDER) for place in places)
