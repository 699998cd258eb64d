"""What made a figure: commit, machine and time."""

import datetime
import platform
import subprocess
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parents[1]


def describe(device: str = 'cpu') -> dict[str, str]:
    """Return ``date``, ``commit`` and ``machine``, as text.

    Args:
        device (str): The machine is named by its processor, or by its GPU on 'cuda'.
    """
    try:
        commit = subprocess.run(
            ['git', 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*'],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = 'unknown'
    is_cuda = device.startswith('cuda')
    return dict(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        commit=commit,
        machine=torch.cuda.get_device_name(device) if is_cuda else _cpu_name(),
    )


def _cpu_name() -> str:
    info = Path('/proc/cpuinfo')
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    return platform.processor() or platform.machine()
