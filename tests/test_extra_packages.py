"""The packages that only tests import are there for these tests and for nobody else."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import extra_packages
import pytest

pytestmark = pytest.mark.skipif(
    not extra_packages.FOLDER.is_dir(), reason='needs the extra packages of `make setup`'
)


def test_packages_are_importable_within_and_absent_afterwards():
    path = list(sys.path)
    with extra_packages.importable():
        import torchvision
        from torchvision.ops import boxes
    assert importlib.util.find_spec('torchvision') is None
    assert not any(name.split('.')[0] in ('torchvision', 'timm') for name in sys.modules)
    assert sys.path == path
    with pytest.raises(ModuleNotFoundError):
        import torchvision  # noqa: F811

    with extra_packages.importable():
        import torchvision as again
        from torchvision.ops import boxes as boxes_again
    assert (again, boxes_again) == (torchvision, boxes)


def test_packages_are_absent_after_an_error():
    with pytest.raises(ZeroDivisionError), extra_packages.importable():
        import torchvision  # noqa: F401

        raise ZeroDivisionError
    assert importlib.util.find_spec('torchvision') is None
    assert 'torchvision' not in sys.modules


def test_process_of_its_own_enables_them():
    code = 'import extra_packages; extra_packages.enable(); import timm, torchvision'
    subprocess.run(
        [sys.executable, '-c', code], cwd=Path(extra_packages.__file__).parent, check=True
    )


def test_missing_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(extra_packages, 'FOLDER', tmp_path / 'extra')
    with pytest.raises(ModuleNotFoundError, match='make setup'):
        extra_packages.enable()
