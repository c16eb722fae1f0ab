"""Stage "sweep": the trained model beside K-means of the pixels, by K: benchmarks/rate_distortion.py, one seed.

Its lines are kept in rate_distortion.jsonl, with where they come from, after every K, and those that count are put back
before it goes on elsewhere; its runs are not kept.
"""

import json
import sys

from gpu.commands import Finished, run_command, tail
from gpu.pictures import picture_flags
from gpu.results import ROOT, Results, read_lines
from gpu.stage import FINISHED, Context

NUM_CODES = (512, 256, 64, 16, 1024, 1)
"""The most telling first."""

_NAME = ("method", "num_codes", "seed")  # of a line
_TO_SAVE_S = 25.0  # kept of the stage's time: a run that is stopped saves itself first
_LEAST_S = 60.0  # a K is not begun for less


def run(context: Context) -> str:
    """Let the benchmark do what its results do not hold yet, one K after the other."""
    if context.data_dir is None and not context.rehearse:
        return "skipped: no --data-dir"
    results = context.results("rate_distortion")
    numbers = (2,) if context.rehearse else NUM_CODES
    for number in numbers:
        if len(list(results.matching(num_codes=number))) == 2:
            continue
        seconds = context.left_s() - _TO_SAVE_S
        finished = compare(results, context, number, seconds) if seconds > _LEAST_S else None
        if finished is None or finished.exit_code is None:
            return f"{len(results.lines)} of {2 * len(numbers)} pieces done: no time left"
        if finished.exit_code:
            return f"failed: {tail(finished.output)}"
    return FINISHED


def compare(results: Results, context: Context, num_codes: int, seconds: float) -> Finished:
    """One K: its lines are in the results when this returns, however it ends."""
    folder = context.work / "rate_distortion"
    folder.mkdir(parents=True, exist_ok=True)
    current = folder / "results.jsonl"
    current.write_text("".join(json.dumps(line) + "\n" for line in results.lines))
    command = [sys.executable, str(ROOT / "benchmarks" / "rate_distortion.py"), "--out", str(folder), "--seeds", "0"]
    command += ["--num-codes", str(num_codes), *picture_flags(context)]
    if context.rehearse:
        command += ["--code-dim", "8", "--hidden-dims", "8", "--epochs", "1", "--batch-size", "8", "--device", "cpu"]
        command += ["--starts", "1", "--rounds", "1"]
    try:
        return run_command(command, seconds=seconds)
    finally:
        for line in read_lines(current):
            if not results.has(**{name: line[name] for name in _NAME}):
                results.add(**line)
