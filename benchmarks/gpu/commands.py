"""Commands that the pass and its stages run: ended in time, with all that they have started. Needs no PyTorch."""

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from child_processes import end, killed_with_parent

from gpu.results import ROOT


class Finished(NamedTuple):
    """A command that has ended.

    Attributes:
        exit_code: None where it was stopped at its time limit.
        output: what it wrote to both streams.
        seconds: how long it took.
    """

    exit_code: int | None
    output: str
    seconds: float


def child_environment(**entries: str) -> dict[str, str]:
    """The environment of a process of this pass: the checkout's packages are found."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    found = os.pathsep.join(dict.fromkeys(path for path in paths if path))
    return {**os.environ, "PYTHONPATH": found, "PYTHONUNBUFFERED": "1", **entries}


def run_command(command: Sequence[str | Path], *, seconds: float, **environment: str) -> Finished:
    """Run a command in the checkout, and end it, with all that it has started, after so many seconds.

    It is asked to stop first, and gets a few seconds more for that. Its output goes to a file: a pipe would be waited
    for as long as any process holds it.
    """
    start = time.monotonic()
    exit_code: int | None = None
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=child_environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, which can be ended as a whole
            preexec_fn=killed_with_parent,
        )
        try:
            exit_code = process.wait(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            pass
        finally:
            end(process)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Finished(exit_code, text, time.monotonic() - start)


def tail(text: str, characters: int = 3000) -> str:
    """The end of a command's output, for a result line."""
    return text if len(text) <= characters else "..." + text[-characters:]
