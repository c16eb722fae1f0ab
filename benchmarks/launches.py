"""Times the Python in front of the launches of a Triton search, without a GPU.

    python benchmarks/launches.py

Searches a few rows on the CPU with kernels that do nothing. Prints the median microseconds of a search, with a prepared
codebook and without one, and of one `torch.add`.
"""

import statistics
import sys
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import the package from the checkout

import torch
import tyro
from triton.runtime.jit import JITFunction

from benchmarks.timing import burst
from vq_kernels.search.triton.launch import prepare, search


def _launch_nothing(*arguments: object, **options: object) -> None: ...


def main(count: int = 2000) -> None:
    """Runs the command.

    Args:
        count: calls of each.
    """
    x, codebook = torch.randn(64, 96), torch.randn(256, 96)
    with mock.patch.object(JITFunction, "run", _launch_nothing):
        operands = prepare(codebook)
        calls = {
            "torch.add": lambda: torch.add(x, x),
            "search, prepared": lambda: search(x, codebook, operands),
            "search": lambda: search(x, codebook, []),
        }
        elapsed_us = {name: 1e3 * statistics.median(burst(call, count, x.device)) for name, call in calls.items()}
    for name, median_us in elapsed_us.items():
        print(f"{name}: {median_us:.1f} us, {median_us / elapsed_us['torch.add']:.1f} times torch.add")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
