"""Package metadata of ubn_det.

MMDetection and its foundations come in two families that are imported under the same names:
OneDL's and OpenMMLab's. Installing this package must not put one over the other, so it requires
neither; the extras `onedl` and `openmmlab` name what each family needs. Which build of PyTorch is
right depends on the machine: any that is there and new enough is left alone.

The CPU kernels are compiled against the torch of the environment, so `pip install` needs
`--no-build-isolation`. Without torch or a C++ compiler the package is installed without them, and
runs on PyTorch's operators.
"""

import platform
import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent


def read(file: str, name: str) -> str:
    """Read a version as text: importing the package needs all that it is built on."""
    text = (ROOT / 'ubn_det' / file).read_text(encoding='utf-8')
    found = re.search(rf"^{name} = '([^']+)'", text, flags=re.MULTILINE)
    if not found:
        raise RuntimeError(f'ubn_det/{file} has no line {name} = ...')
    return found[1]


def kernels() -> dict[str, object]:
    """Return the part of the set-up that compiles the CPU kernels, where torch is at hand."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}
    is_x86 = platform.machine().lower() in ('x86_64', 'amd64')
    extension: Extension = CppExtension(
        'ubn_det.ops._cpu',
        sorted(str(path.relative_to(ROOT)) for path in ROOT.glob('ubn_det/ops/cpu/*.cpp')),
        depends=sorted(
            str(path.relative_to(ROOT)) for path in ROOT.glob('ubn_det/ops/cpu/*.[hi]*')
        ),
        extra_compile_args=[
            # The OpenMP that torch brings is not linked a second time: at::parallel_for finds it.
            '-fopenmp',
            # Vectors are passed between inlined functions only.
            *('-O3', '-g0', '-std=c++20', '-Wno-psabi', '-Wno-maybe-uninitialized'),
            f'-DUBN_X86={int(is_x86)}',
        ],
        optional=True,
    )
    return dict(ext_modules=[extension], cmdclass=dict(build_ext=BuildExtension))


setup(
    name='ubn_det',
    version=read('__init__.py', '__version__'),
    description='Unified Batch Normalization for MMDetection',
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires='>=3.10',
    packages=find_packages(where=str(ROOT), include=['ubn_det', 'ubn_det.*']),
    **kernels(),
    install_requires=['numpy', f'torch>={read("_torch_floor.py", "MINIMUM_TORCH")}'],
    extras_require={
        'onedl': [
            'onedl-mmengine>=0.10.12,<1',
            'onedl-mmcv>=2.3.6,<3',
            'onedl-mmdetection>=3.5.1,<4',
        ],
        # For configs/mmpretrain and configs/mmseg.
        'classification': ['onedl-mmpretrain>=1.3.6,<2', 'torchvision'],
        'segmentation': ['onedl-mmsegmentation>=1.4.2,<2'],
        'openmmlab': ['mmengine>=0.10,<1', 'mmcv>=2.0.0,<2.2', 'mmdet>=3.0,<4'],
        'tests': ['hypothesis', 'onnx', 'onnxruntime', 'onnxscript', 'pytest'],
    },
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    zip_safe=False,
)
