"""Stage "sweep": the trained model beside K-means of the pixels, by K: benchmarks/rate_distortion.py, one seed.

Its results.jsonl is kept as rate_distortion.jsonl, and put back before it goes on elsewhere; its runs are not kept.
"""

import shutil
import sys

from gpu.pictures import picture_flags
from gpu.results import ROOT, read_lines
from gpu.stage import FINISHED, Context, run_command, tail

NUM_CODES = (512, 256, 64, 16, 1024, 1)
"""The most telling first."""


def run(context: Context) -> str:
    """Let the benchmark do what its results do not hold yet."""
    if context.data_dir is None and not context.rehearse:
        return "skipped: no --data-dir"
    folder = context.work / "rate_distortion"
    folder.mkdir(parents=True, exist_ok=True)
    kept, current = context.out / "rate_distortion.jsonl", folder / "results.jsonl"
    if kept.exists() and not current.exists():
        shutil.copy(kept, current)
    command = [sys.executable, str(ROOT / "benchmarks" / "rate_distortion.py"), "--out", str(folder), "--seeds", "0"]
    if context.rehearse:
        command += ["--code-dim", "8", "--hidden-dims", "8", "--epochs", "1", "--batch-size", "8", "--device", "cpu"]
        command += ["--num-codes", "2", "--starts", "1", "--rounds", "1"]
    else:
        command += ["--num-codes", *map(str, NUM_CODES)]
    command += picture_flags(context)
    finished = run_command(command, seconds=context.left_s() - 5)
    if current.exists():
        shutil.copy(current, kept)
    if finished.exit_code is None:
        return f"{len(read_lines(kept))} of {2 * len(NUM_CODES)} pieces done: no time left"
    return FINISHED if finished.exit_code == 0 else f"failed: {tail(finished.output)}"
