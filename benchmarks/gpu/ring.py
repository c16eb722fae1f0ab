"""Stage "tests": the tests marked `gpu`, in a process of their own, its summary and its failures kept."""

import importlib.util
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from gpu.results import ROOT
from gpu.stage import FINISHED, Context, run_command, tail

_PROCESSES = 6  # compile side by side; one GPU holds all of them
_KEPT_FAILURES = 20


def run(context: Context) -> str:
    """Run the tests once, and write one line with what came of them."""
    results = context.results("tests")
    if results.has(status="passed"):
        return FINISHED
    report = context.work / "tests.xml"
    report.unlink(missing_ok=True)
    side_by_side = ["-n", str(_PROCESSES)] if importlib.util.find_spec("xdist") and not context.rehearse else []
    # What versions of other packages that were never tested together warn of is no finding about the kernels.
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider"]
    command += [*side_by_side, f"--junitxml={report}", *map(str, gpu_test_files())]
    finished = run_command(command, seconds=context.left_s() - 5)
    found = read_report(report) if report.exists() else {}
    if finished.exit_code is None:
        status = "stopped at its time limit"
    else:
        done = finished.exit_code == 0 and (context.rehearse or found["passed"] > 0)
        status = "passed" if done else "failed"
    kept_output = {} if status == "passed" else {"output": tail(finished.output)}
    results.add(status=status, seconds=round(finished.seconds, 1), exit_code=finished.exit_code, **found, **kept_output)
    return FINISHED if status == "passed" else f"failed: the tests {status}; see {results.file.name}"


def gpu_test_files() -> list[Path]:
    """The test files that mark anything `gpu`: others need not be importable on the GPU's machine."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [file for file in files if "pytest.mark.gpu" in file.read_text(encoding="utf-8")]


def read_report(file: Path) -> dict[str, Any]:
    """What a JUnit report of pytest says: how many tests passed, failed and were skipped, and the failures' texts."""
    cases = list(ElementTree.parse(file).iter("testcase"))  # noqa: S314 - pytest has just written it
    failures = []
    skipped: dict[str, int] = {}
    for case in cases:
        for outcome in case:
            text = f"{outcome.get('message', '')}\n{outcome.text or ''}"
            if outcome.tag in ("failure", "error"):
                failures.append({"test": f"{case.get('classname')}::{case.get('name')}", "text": tail(text, 1500)})
            elif outcome.tag == "skipped":
                reason = outcome.get("message", "")
                skipped[reason] = skipped.get(reason, 0) + 1
    return {
        "passed": len(cases) - len(failures) - sum(skipped.values()),
        "failed": len(failures),
        "skipped": skipped,
        "failures": failures[:_KEPT_FAILURES],
    }
