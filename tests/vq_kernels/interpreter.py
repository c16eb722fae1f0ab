"""Runs tests in a process of their own, because Triton's interpreter must be chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_FAST = "tests.vq_kernels.fast_interpreter"
# NumPy warns that Triton 3.6's interpreter converts arrays of one element to scalars.
_ALLOWED = "ignore:Conversion of an array with ndim:DeprecationWarning"


def run_interpreted(*arguments: str | Path) -> str:
    """Runs pytest with these arguments under TRITON_INTERPRET=1 and returns its output; fails if it does."""
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", _FAST, "-W", _ALLOWED, *arguments],
        cwd=_ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout
