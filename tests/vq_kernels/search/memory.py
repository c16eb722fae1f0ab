"""What a call holds at its peak, measured in a process that has done nothing else."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def extra_mib(call: str, num_rows: int, num_codes: int, code_dim: int) -> float:
    """The most memory, in MiB, outputs included, that a call on x and codebook takes beyond what was held before it.

    The call, as text, has names of vq_kernels at hand; it is made once before, on fewer rows, since what libraries keep
    for good is not meant.
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux, which tells the peak of the resident memory")
    program = f"""
        import sys, torch
        sys.path.insert(0, {str(BENCHMARKS)!r})
        from search_timing import peak_mib
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
