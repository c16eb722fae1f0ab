"""The peak memory of a call, measured in a separate process, and its limit for the Triton search."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def workspace_limit(n: int, k: int, d: int) -> int:
    """Bytes a search may allocate besides inputs and outputs: 1 % of [n, k] in float32, or 16 MiB plus the codebook."""
    return max(n * k * 4 // 100, 16 * 2**20 + 4 * k * d)


def extra_mib(call: str, num_rows: int, num_codes: int, code_dim: int) -> float:
    """Peak memory in MiB, including outputs, that a call on x and codebook adds.

    The call is text and may use the names of vq_kernels. It runs once before on fewer rows, so that memory that
    libraries allocate once does not count.
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux, for the peak of the resident memory")
    program = f"""
        import sys, torch
        sys.path.insert(0, {str(ROOT)!r})
        from benchmarks.timing import peak_mib
        from vq_kernels import *
        torch.manual_seed(0)
        rows, codebook = torch.randn({num_rows}, {code_dim}), torch.randn({num_codes}, {code_dim})
        x = rows[:5000]
        {call}
        x = rows
        print(peak_mib(lambda: {call}, x.device))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout)
