"""Stage "tests": the tests marked `gpu`, in a process of their own, a line as soon as a test is done.

The lines are in checks.jsonl: "op": "test" for a test, with its outcome and, of a failure, its text; "op": "tests" for
what came of all. A test that passed is not run again, so that a ring that is cut short is gone on with.

pytest is given ring_plugin.py for that.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from gpu.commands import run_command, tail
from gpu.results import ROOT, Line, Results
from gpu.ring_plugin import ORDERS
from gpu.stage import FINISHED, Context

CHECKS = "checks"
_PROCESSES = 14  # compile side by side; one GPU holds all of them
_FOLDERS = ("tests/vq_kernels/search", "tests/vq_kernels/gradient")  # whose tests run on every backend that is there
_DONE = ("passed", "skipped")


def run(context: Context) -> str:
    """Run the tests that have not passed yet, and write one line with what came of all."""
    results = context.results(CHECKS)
    if results.has(op="tests", status="passed"):
        return FINISHED
    processes = min(_PROCESSES, max((os.cpu_count() or 1) - 2, 1))
    side_by_side = importlib.util.find_spec("xdist") is not None and not context.rehearse
    # What versions of other packages that were never tested together warn of is no finding about the kernels.
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "-p", "gpu.ring_plugin"]
    command += [*(["-n", str(processes)] if side_by_side else []), *map(str, gpu_test_files())]
    done = [line["test"] for line in last_lines(results) if line["outcome"] in _DONE]
    orders = context.work / "ring.json"
    orders.write_text(json.dumps({"file": str(results.file.resolve()), "header": dict(results.header), "done": done}))
    finished = run_command(command, seconds=context.left_s() - 5, **{ORDERS: str(orders)})
    found = count(context.results(CHECKS))
    if finished.exit_code is None:
        status = "stopped at its time limit"
    else:
        # 5: no test is left that could be run
        ended_well = finished.exit_code in (0, 5) and not found["failed"]
        status = "passed" if ended_well and (context.rehearse or found["passed"]) else "failed"
    kept_output = {} if status == "passed" else {"output": tail(finished.output)}
    seconds = round(finished.seconds, 1)
    results.add(op="tests", status=status, seconds=seconds, exit_code=finished.exit_code, **found, **kept_output)
    if status == "passed":
        return FINISHED
    return f"failed: the tests {status}, {found['passed']} passed, {found['failed']} failed; see {results.file.name}"


def gpu_test_files() -> list[Path]:
    """The test files that mark anything `gpu`: others need not be importable on the GPU's machine."""
    files = sorted((ROOT / "tests" / "vq_kernels").rglob("test_*.py"))
    folders = tuple(str(ROOT / folder) for folder in _FOLDERS)
    return [
        file for file in files if str(file).startswith(folders) or "pytest.mark.gpu" in file.read_text(encoding="utf-8")
    ]


def last_lines(results: Results) -> list[Line]:
    """The last line of each test."""
    return list({line["test"]: line for line in results.matching(op="test")}.values())


def count(results: Results) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, and why."""
    lines = last_lines(results)
    skipped: dict[str, int] = {}
    for line in lines:
        if line["outcome"] == "skipped":
            skipped[line["text"]] = skipped.get(line["text"], 0) + 1
    outcomes = [line["outcome"] for line in lines]
    return {"passed": outcomes.count("passed"), "failed": outcomes.count("failed"), "skipped": skipped}
