"""What a stage of the GPU pass is given, and what the pass knows of each stage."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu.results import Results

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
        needs: modules beyond PyTorch without which it does not run.
        on_any_gpu: its results hold on every GPU, so those of another need not be done again.
    """

    name: str
    module: str
    minutes: float
    folders: tuple[str, ...]
    shows: str
    needs: tuple[str, ...] = ()
    on_any_gpu: bool = False


_SEARCH = ("vq_kernels/search", "vq_kernels/gradient")
_MODEL = ("vq_kernels", "vqae")
_RING = (*_SEARCH, "tests/vq_kernels/search", "tests/vq_kernels/gradient")
_TESTS = ("pytest", "pytest_timeout", "hypothesis")
_PICTURES = ("numpy", "PIL", "torchvision")
_COMMANDS = ("typing_extensions", "typeguard", "docstring_parser", "tyro", "rich", "matplotlib")
_TRAINING = (*_PICTURES, *_COMMANDS, "tqdm", "tensorboard")

STAGES = (
    Stage("tests", "gpu.ring", 4.0, _RING, "the tests that need a GPU", _TESTS, on_any_gpu=True),
    Stage("exactness", "gpu.exactness", 5.5, _SEARCH, "10^9 rows against float64", _PICTURES),
    Stage("sanitizers", "gpu.sanitizers", 4.0, _SEARCH, "memcheck, racecheck of every kernel", on_any_gpu=True),
    Stage("search", "gpu.search", 5.0, _SEARCH, "times and memory beside other searches", (*_PICTURES, *_COMMANDS)),
    Stage("tiles", "gpu.tiles", 5.0, _SEARCH, "the choice of tiles, where the time goes", (*_PICTURES, *_COMMANDS)),
    Stage("training", "gpu.training", 4.0, _MODEL, "seconds to the target, pictures a second", _TRAINING),
    Stage("sweep", "gpu.sweep", 7.5, _MODEL, "the model beside K-means of the pixels, by K", _TRAINING),
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
        on_any_gpu: see `Stage`.
        data_dir: CIFAR-10 as an image folder, where it is given.
        checkpoint: a model of vqae.train, where it is given.
    """

    out: Path
    work: Path
    header: Mapping[str, Any]
    deadline: float
    rehearse: bool
    on_any_gpu: bool = False
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
        return Results(self.out / f"{name}.jsonl", self.header, on_any_gpu=self.on_any_gpu)


class Pace:
    """Does pieces of a stage one after the other while there is time for one more of their kind.

    Args:
        context: of the stage.
        first_s: what the first piece of a kind may take; the others take no more than 1.5 times the longest so far.
    """

    def __init__(self, context: Context, first_s: float = 60.0) -> None:
        self._context, self._first_s = context, first_s
        self._longest: dict[object, float] = {}

    def do(self, piece: Callable[[], object], kind: object) -> bool:
        """Do one piece and wait for the device; False, and nothing done, where there is no time for its kind."""
        start = time.monotonic()
        needed = 1.5 * self._longest[kind] + 5 if kind in self._longest else self._first_s
        if self._context.left_s() < needed:
            return False
        piece()
        self._context.synchronize()
        self._longest[kind] = max(self._longest.get(kind, 0.0), time.monotonic() - start)
        return True
