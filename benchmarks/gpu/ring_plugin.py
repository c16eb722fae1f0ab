"""What pytest is given by ring.py: it writes a line as soon as a test is done, and leaves out those that are. Needs no
PyTorch."""

import json
import os
from pathlib import Path

import pytest

from gpu.commands import tail
from gpu.results import Results

ORDERS = "GPU_RING_ORDERS"
"""In the environment: a JSON file that holds "file" and "header" of the results, and "done", the tests to leave out."""


def pytest_configure(config: pytest.Config) -> None:
    """Nothing where the stage has not started this pytest."""
    if ORDERS in os.environ:
        orders = json.loads(Path(os.environ[ORDERS]).read_text())
        # Of tests side by side one process sees all reports; the others only have to leave out the same.
        writes = not hasattr(config, "workerinput")
        results = Results(Path(orders["file"]), orders["header"]) if writes else None
        config.pluginmanager.register(_Ring(results, {*orders["done"]}))


class _Ring:
    """The hooks of one pytest: writes to the results, where there are any, and leaves out what is done."""

    def __init__(self, results: Results | None, done: set[str]) -> None:
        self._results, self._done = results, done

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what is done."""
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self._done])
        items[:] = [item for item in items if item.nodeid not in self._done]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write the line of a test that has run, was skipped, or broke before or after it ran."""
        if self._results is None or (report.when != "call" and report.passed):
            return
        if report.skipped and isinstance(report.longrepr, tuple):
            text = {"text": report.longrepr[2].removeprefix("Skipped: ")}
        else:
            text = {} if report.passed else {"text": tail(report.longreprtext, 1500)}
        seconds = round(report.duration, 2)
        self._results.add(op="test", test=report.nodeid, outcome=report.outcome, seconds=seconds, **text)
