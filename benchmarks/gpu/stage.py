"""What a stage of the GPU pass is given, and what the pass knows of each stage."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpu.results import ROOT, Results

FINISHED = "finished"
"""What a stage returns when nothing of it is left to do; anything else says what is left, or why it cannot be done."""


@dataclass(frozen=True)
class Stage:
    """A stage of the pass.

    Attributes:
        name: on the command line and in the results.
        module: has `run(context) -> str`, which works off what its results do not hold yet.
        minutes: what it may take at most; it stops by itself.
        folders: those of the checkout that its results depend on.
        shows: in a few words, for the log.
    """

    name: str
    module: str
    minutes: float
    folders: tuple[str, ...]
    shows: str


_SEARCH = ("vq_kernels/search", "vq_kernels/gradient")
_MODEL = ("vq_kernels", "vqae")

STAGES = (
    Stage("tests", "gpu.ring", 3.0, (*_SEARCH, "tests/vq_kernels/search"), "the tests that need a GPU"),
    Stage("exactness", "gpu.exactness", 5.5, _SEARCH, "10^9 rows against float64"),
    Stage("sanitizers", "gpu.sanitizers", 4.0, _SEARCH, "memcheck and racecheck of every kernel"),
    Stage("search", "gpu.search", 5.0, _SEARCH, "times and memory beside other searches"),
    Stage("tiles", "gpu.tiles", 5.0, _SEARCH, "the choice of tiles, and where the time goes"),
    Stage("training", "gpu.training", 4.0, _MODEL, "seconds to the target, pictures a second"),
    Stage("sweep", "gpu.sweep", 7.5, _MODEL, "the model beside K-means of the pixels, by K"),
)
"""All stages, the most important first."""


@dataclass(frozen=True)
class Context:
    """What a stage is given.

    Attributes:
        out: the folder of the results.
        work: a folder for everything else, which does not outlive the machine.
        header: the entries of every result line.
        deadline: of `time.monotonic`; the stage stops before it.
        rehearse: run in small, on the CPU, with the kernels interpreted.
        data_dir: CIFAR-10 as an image folder, where it is given.
        checkpoint: a model of vqae.train, where it is given.
    """

    out: Path
    work: Path
    header: Mapping[str, Any]
    deadline: float
    rehearse: bool
    data_dir: Path | None = None
    checkpoint: Path | None = None

    @property
    def device(self) -> torch.device:
        """Where the stage computes."""
        return torch.device("cpu" if self.rehearse else "cuda")

    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def synchronize(self) -> None:
        """Wait for the device; raises what broke on it, after which this process can measure nothing more."""
        if not self.rehearse:
            torch.cuda.synchronize()

    def results(self, name: str) -> Results:
        """The results in the file `name`.jsonl."""
        return Results(self.out / f"{name}.jsonl", self.header)


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
    """Run a command in the checkout, and end it, with all that it has started, after so many seconds."""
    start = time.monotonic()
    with subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=child_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a group of its own, which can be ended as a whole
    ) as process:
        try:
            output, _ = process.communicate(timeout=max(seconds, 0.1))
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return Finished(None, output, time.monotonic() - start)
    return Finished(process.returncode, output, time.monotonic() - start)


def tail(text: str, characters: int = 3000) -> str:
    """The end of a command's output, for a result line."""
    return text if len(text) <= characters else "..." + text[-characters:]
