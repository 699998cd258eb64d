"""What all tests share."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

# For `import reference`, `import generated` and `import study`, in whatever way pytest imports the
# tests: scripts import their neighbours too, as they do when they are run.
TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS / 'helpers'), *(str(TESTS.parent / f) for f in ('demo', 'benchmarks'))]

# The tensors are small: on busy cores the tests of the layers take 190 s with two threads and 22 s
# with one.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def device(request):
    if request.param == 'cuda' and not torch.cuda.is_available():
        pytest.skip('needs an accelerator')
    return torch.device(request.param)


@pytest.fixture(params=['kernels', 'operators'])
def implementation(request, monkeypatch):
    """Run the layer on its kernels, and then on PyTorch's operators."""
    import kernels

    if request.param == 'operators':
        monkeypatch.setattr('ubn_det.ops.dispatch._CPU_KERNELS', None)
    elif not kernels.HAS_KERNELS:
        pytest.skip(kernels.REASON)
    return request.param


@pytest.fixture(scope='module')
def extra_packages():
    """Make timm and torchvision importable for the tests of one module."""
    import extra_packages as packages

    if not packages.FOLDER.is_dir():
        pytest.skip('needs the extra packages of `make setup`')
    with packages.importable():
        yield


@pytest.fixture
def process_group(tmp_path):
    """Form a group of this process alone."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()
