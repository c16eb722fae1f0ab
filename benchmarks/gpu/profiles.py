"""Where a search's time goes: its kernels, and what Nsight Compute counts in the scan.

Run as a program, with N K D, it is what Nsight Compute watches: three searches of normal data.
"""

import csv
import shutil
import sys
from io import StringIO

import torch
from child_processes import killed_with_parent
from torch.profiler import ProfilerActivity, profile

from gpu.commands import run_command, tail
from gpu.results import Results
from gpu.search import Shape, draw
from gpu.stage import Context
from vq_kernels import PreparedCodebook, nearest_code

COUNTERS_S = 75.0
"""What Nsight Compute may take for a shape: where it hangs, the stage goes on."""

_CALLS = 5
_COLUMNS = ("Section Name", "Metric Name", "Metric Unit", "Metric Value")
_SECTIONS = (
    *("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "Occupancy", "SchedulerStats"),
    *("WarpStateStats", "LaunchStats"),
)


def profile_kernels(results: Results, context: Context, shape: Shape) -> None:
    """The lines of a shape: every kernel of a search, how often it runs in one, and its mean time; the codebook is
    prepared in the search, and beforehand."""
    size = {"N": shape[0], "K": shape[1], "D": shape[2]}
    data = draw(shape, context)
    prepared = PreparedCodebook.from_codebook(data.codebook, backend="triton")
    calls = 1 if context.rehearse else _CALLS
    for name, codebook in (("search", data.codebook), ("search, prepared", prepared)):
        if results.has(op="profile", name=name, **size):
            continue
        nearest_code(data.x, codebook, backend="triton")
        with profile(activities=[ProfilerActivity.CPU if context.rehearse else ProfilerActivity.CUDA]) as profiler:
            for _ in range(calls):
                nearest_code(data.x, codebook, backend="triton")
            context.synchronize()
        kernels = [
            {"kernel": event.key[:80], "launches": event.count / calls, "us": event.self_device_time_total / calls}
            for event in profiler.key_averages()
            if event.self_device_time_total > 0
        ]
        launches, total_us = (sum(kernel[entry] for kernel in kernels) for entry in ("launches", "us"))
        results.add(op="profile", name=name, **size, launches=launches, total_us=total_us, kernels=kernels)


def profile_counters(results: Results, context: Context, shape: Shape) -> None:
    """The line of a shape with what Nsight Compute counts in the scan, or why it does not."""
    size = {"N": shape[0], "K": shape[1], "D": shape[2]}
    if results.has(op="counters", **size):
        return
    tool = shutil.which("ncu")
    if tool is None or context.rehearse:
        results.add(op="counters", **size, status=f"skipped: {'a rehearsal' if tool else 'ncu is not installed'}")
        return
    # The clocks are left as they are: another program may share the machine.
    command = [tool, "--clock-control", "none", "--kernel-name", "regex:_scan_kernel", "--launch-skip", "1"]
    command += ["--launch-count", "1", *(part for section in _SECTIONS for part in ("--section", section))]
    command += ["--csv", "--page", "details", sys.executable, "-m", "gpu.profiles", *map(str, shape)]
    finished = run_command(command, seconds=min(context.left_s() - 5, COUNTERS_S))
    figures = read_counters(finished.output)
    status = {"status": "ok"} if figures else {"status": "failed", "output": tail(finished.output, 1500)}
    results.add(op="counters", **size, **status, figures=figures)


def read_counters(output: str) -> dict[str, str]:
    """The figures in Nsight Compute's CSV: "section: metric [unit]" -> value, as it wrote them."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    figures: dict[str, str] = {}
    for row in csv.DictReader(StringIO("\n".join(lines))):
        section, metric, unit, value = (row.get(name) or "" for name in _COLUMNS)
        if metric and value:
            figures[f"{section}: {metric} [{unit}]"] = value
    return figures


def main() -> int:
    """The first search compiles."""
    killed_with_parent()
    num_rows, num_codes, code_dim = map(int, sys.argv[1:])
    x, codebook = (torch.randn(rows, code_dim, device="cuda") for rows in (num_rows, num_codes))
    for _ in range(3):
        nearest_code(x, codebook, backend="triton")
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
