"""Stage "sanitizers": compute-sanitizer's memcheck and racecheck over small cases of every kernel.

Run as a program it is the cases themselves, and prints which kernels ran, a line of JSON:

    PYTHONPATH=.:benchmarks compute-sanitizer --tool memcheck python -m gpu.sanitizers
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from child_processes import killed_with_parent
from torch import Tensor

from gpu.commands import Finished, run_command, tail
from gpu.stage import FINISHED, Context
from vq_kernels.gradient import triton_backend
from vq_kernels.search.triton import prepare, rerank, scan
from vq_kernels.search.triton.common import ceil_div
from vq_kernels.search.triton.launch import device_properties, search_with_plan
from vq_kernels.search.triton.plan import SearchPlan, pick_config

# An error that an API returns and the caller deals with, as PyTorch does when it asks what is there, is no finding.
TOOLS = {"memcheck": ("--padding", "64", "--report-api-errors", "no"), "racecheck": ()}

_MODULES = (prepare, scan, rerank, triton_backend)
_ERRORS_FOUND = 9  # exit code
_SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
_ROWS, _CODES = 24, 140  # neither a multiple of a tile; more codes than a tile of any configuration holds
_DIMS = (16, 50, 200)  # aligned, not aligned, and too long for a tile of x' to stay on the chip
_REHEARSED_DIMS = (16, 200)


def run(context: Context) -> str:
    """Run the cases without a tool, which compiles the kernels, and then with each tool that has no clean line yet."""
    results = context.results("checks")
    cases = [sys.executable, "-m", "gpu.sanitizers"]
    if not results.has(tool="none", status="clean"):
        results.add(op="sanitizer", tool="none", **read(run_command(cases, seconds=context.left_s() - 5)))
    if not results.has(tool="none", status="clean"):
        return f"failed: the cases do not run without a sanitizer; see {results.file.name}"
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return "skipped: compute-sanitizer is not installed"
    for tool, flags in TOOLS.items():
        if results.has(tool=tool, status="clean"):
            continue
        command = [sanitizer, "--tool", tool, *flags, "--kernel-name", "kns=_kernel"]
        command += ["--error-exitcode", str(_ERRORS_FOUND), "--target-processes", "application-only", *cases]
        # Without the cache every tensor is an allocation of its own, so that a read past one is seen.
        finished = run_command(command, seconds=context.left_s() - 5, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        results.add(op="sanitizer", tool=tool, **read(finished))
    unclean = [tool for tool in TOOLS if not results.has(tool=tool, status="clean")]
    return FINISHED if not unclean else f"failed: {', '.join(unclean)} not clean; see {results.file.name}"


def read(finished: Finished) -> dict[str, Any]:
    """What a run of the cases found, as entries of its line."""
    launched = next(
        (json.loads(line) for line in finished.output.splitlines() if line.startswith('{"searches"')), {"missing": None}
    )
    counts = [int(one or other) for one, other in _SUMMARY.findall(finished.output)]
    if finished.exit_code is None:
        status = "stopped at its time limit"
    elif finished.exit_code == 0 and launched["missing"] == [] and not any(counts):
        status = "clean"
    elif finished.exit_code == _ERRORS_FOUND or any(counts):
        status = "errors found"
    else:
        status = "failed"
    entries = {"status": status, "errors": sum(counts) if counts else None, **launched}
    entries |= {"exit_code": finished.exit_code, "seconds": round(finished.seconds, 1)}
    return entries if status == "clean" else {**entries, "output": tail(finished.output)}


def make_case(code_dim: int, device: str) -> tuple[Tensor, Tensor]:
    """Rows and codes of which some rows are proved, some resolved (twins), some drained (many equal codes)."""
    generator = torch.Generator().manual_seed(code_dim)
    codebook = torch.randn(_CODES, code_dim, generator=generator)
    codebook[3::50] = codebook[0::50]
    codebook[10:50] = codebook[10]
    x = codebook[torch.arange(_ROWS) * 7 % _CODES] + 0.01 * torch.randn(_ROWS, code_dim, generator=generator)
    return x.to(device), codebook.to(device)


def plans(x: Tensor) -> Iterator[SearchPlan]:
    """The tiles that many rows and few rows [.., D] like x get, each with the codebook whole and in two parts."""
    properties = device_properties(x.device)
    configs = [pick_config(rows, _CODES, x.shape[1], x.dtype, properties) for rows in (1 << 20, _ROWS)]
    for config in dict.fromkeys(configs):
        tiles = ceil_div(_CODES, config.block_k)
        for splits in (1, 2):
            yield SearchPlan(config, splits, ceil_div(tiles, splits), rows_per_launch=config.block_n)


def run_cases(device: str) -> int:
    """Launch everything; returns how many searches that were."""
    searches = 0
    for code_dim in _REHEARSED_DIMS if device == "cpu" else _DIMS:
        x, codebook = make_case(code_dim, device)
        for plan in plans(x):
            indices = search_with_plan(x, codebook, [], "exact", plan)[0]
            searches += 1
        for deterministic in (True, False):
            triton_backend.codebook_gradient(x, codebook, indices, deterministic)
    return searches


class _Noted:
    """A kernel that notes each of its launches."""

    def __init__(self, kernel: Any, name: str, launched: set[str]) -> None:
        self._kernel, self._name, self._launched = kernel, name, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self._launched.add(self._name)
        return self._kernel[grid]


def main() -> int:
    """Run the cases on the GPU, else interpreted."""
    killed_with_parent()
    has_gpu = torch.cuda.is_available()
    kernels = {name: module for module in _MODULES for name in vars(module) if name.endswith("_kernel")}
    launched: set[str] = set()
    with ExitStack() as stack:
        for name, module in kernels.items():
            stack.enter_context(mock.patch.object(module, name, _Noted(getattr(module, name), name, launched)))
        searches = run_cases("cuda" if has_gpu else "cpu")
    if has_gpu:
        torch.cuda.synchronize()
    missing = sorted(kernels.keys() - launched)
    print(json.dumps({"searches": searches, "launched": sorted(launched), "missing": missing}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
