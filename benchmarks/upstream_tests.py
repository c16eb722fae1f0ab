"""Runs the tests of vector-quantize-pytorch on the classes of `vq_kernels.compat`.

    git clone https://github.com/lucidrains/vector-quantize-pytorch
    python benchmarks/upstream_tests.py --tests vector-quantize-pytorch/tests --out results/upstream_tests.jsonl

Each test runs twice, in two processes: on the installed package as it is, and with its classes replaced by ours in all
its modules, so that its own classes that are built from these use ours. It prints a JSON line for each test that
constructs one of these classes, such as

    {"op": "upstream test", "test": "test_readme.py::test_tiger", "classes": ["ResidualVQ"], "ours": "passed", ...}

The exit status is 1 if a test passes there and fails here for another reason than an unsupported keyword.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import the package from the checkout

import pytest
import torch
import tyro
import vector_quantize_pytorch

from benchmarks.results import Row, append_row, environment
from vq_kernels import compat
from vqae.runtime.errors import UsageError

CLASSES = [name for name in compat.__all__ if hasattr(vector_quantize_pytorch, name)]


@dataclass(frozen=True)
class Options:
    """Run the tests of vector-quantize-pytorch on the classes of vq_kernels.compat."""

    tests: Path
    """The folder tests/ of a checkout of vector-quantize-pytorch."""
    out: Path | None = None
    """Append the JSON lines to this file too."""


class Recorder:
    """A plugin of pytest that notes the outcome of each test, and the classes that it constructs."""

    def __init__(self, classes: list[type]) -> None:
        self.outcomes: dict[str, Row] = {}
        self._constructed: list[str] = []
        for each in classes:
            self._watch(each)

    def _watch(self, watched: Any) -> None:
        construct = watched.__init__

        @functools.wraps(construct)
        def noted(module: Any, *args: Any, **keywords: Any) -> None:
            if watched.__name__ not in self._constructed:
                self._constructed.append(watched.__name__)
            construct(module, *args, **keywords)

        watched.__init__ = noted

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Runs a test, after a fixed seed."""
        torch.manual_seed(0)
        self._constructed.clear()
        outcome = {"outcome": "passed", "reason": ""}
        try:
            return (yield)
        except BaseException as error:
            outcome = {"outcome": "failed", "reason": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
            raise
        finally:
            self.outcomes[item.nodeid] = outcome | {"classes": [*self._constructed]}


def outcomes(tests: Path, replace: bool) -> dict[str, Row]:
    """Returns the outcome of each test in a folder. Run it in a process of its own."""
    if replace:
        modules = [module for name, module in sys.modules.items() if name.startswith("vector_quantize_pytorch")]
        for module in modules:
            vars(module).update({name: getattr(compat, name) for name in CLASSES if hasattr(module, name)})
    recorder = Recorder([getattr(vector_quantize_pytorch, name) for name in CLASSES])
    own = ["-c", os.devnull, f"--rootdir={tests}", "-p", "no:cacheprovider", "-p", "no:randomly", "-q", "--tb=no"]
    with contextlib.redirect_stdout(sys.stderr):
        status = pytest.main([str(tests), *own], plugins=[recorder])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise UsageError(f"--tests must be a folder of tests, got {tests}: {status!r}")
    return recorder.outcomes


def run(tests: Path) -> list[Row]:
    """Returns the rows of the tests that construct a class that ours replace."""
    sides = []
    for replace in (False, True):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            sides.append(process.submit(outcomes, tests.resolve(), replace).result())
    command = ["git", "-C", str(tests), "rev-parse", "--short=10", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    common = {"op": "upstream test", "tests_commit": commit, **environment(torch.device("cpu"))}
    rows = []
    for (test, theirs), ours in zip(sides[0].items(), sides[1].values(), strict=True):
        if classes := ours["classes"] or theirs["classes"]:
            results = {"ours": ours["outcome"], "theirs": theirs["outcome"], "reason": ours["reason"]}
            rows.append({"test": test, "classes": classes, **results, **common})
    return rows


def main(options: Options) -> int:
    """Prints the lines and returns the exit status."""
    rows = run(options.tests)
    for row in rows:
        print(json.dumps(row))
        if options.out is not None:
            append_row(options.out, row)
    supported = [row for row in rows if not row["reason"].startswith("NotImplementedError")]
    return int(any(row["ours"] != "passed" == row["theirs"] for row in supported))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="python benchmarks/upstream_tests.py", description=__doc__)))
