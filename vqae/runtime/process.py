"""What every command of this package does around its work: signals, messages, exit codes."""

import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn

from vqae.runtime.errors import DivergedError, LostProcessError, UsageError


def run_command(module_name: str) -> NoReturn:
    """Call the main(arguments, signals) of a module and exit: 0; 2 for bad input; 1 for a loss that is not finite; 130
    after SIGINT, 143 after SIGTERM; of several processes, 1 for those that lost another.

    The module is named, not given, so that it is loaded, and torch with it, after the signal handlers stand. Of the
    processes of one machine, which fail alike, one says why.
    """
    signals = SignalHandler()
    signals.install()
    main = import_module(module_name).main
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vqae").setLevel(logging.INFO if speaks_for_its_machine() else logging.ERROR)
    try:
        with signals.raising():
            main(sys.argv[1:], signals)
            sys.stdout.flush()
    except UsageError as error:
        _say(f"error: {error}")
        sys.exit(2)
    except DivergedError as error:
        _say(f"error: {error}; the last checkpoint is kept, if there is one\na lower --lr may help")
        sys.exit(1)
    except LostProcessError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # each on its own: any of them may be the only one left
        os._exit(1)  # at once: what the lost one still owes would be waited for
    except Interrupted as interrupted:
        _say(f"stopped by {interrupted}")
        sys.exit(interrupted.exit_code)
    sys.exit(0)


def _say(text: str) -> None:
    if speaks_for_its_machine():
        print(text, file=sys.stderr)


class Interrupted(BaseException):
    """The user asked the program to stop. No Exception: no library's `except Exception` may swallow it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class SignalHandler:
    """Turns the first SIGINT or SIGTERM into `Interrupted`, and the second into an exit on the spot.

    Inside `raising()` the exception is raised where the signal arrives; inside `deferred()` it waits for `poll()`.
    Elsewhere, while modules load and while the interpreter shuts down, the first signal exits on the spot as well:
    nothing is to be saved then, and an exception would end in somebody else's traceback.
    """

    def __init__(self) -> None:
        self._received = 0
        self._response: Literal["exit", "raise", "defer"] = "exit"

    def install(self) -> None:
        """Begin to handle both signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._received or self._response == "exit":
            os._exit(128 + number)
        self._received = number
        if self._response == "raise":
            raise Interrupted(number)

    @property
    def received(self) -> int:
        """The number of the signal that has come; 0 before any."""
        return self._received

    def poll(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self._received:
            raise Interrupted(self._received)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """A block in which nothing is half done: a first signal raises `Interrupted` at once."""
        self._response = "raise"
        try:
            yield
        finally:
            self._response = "exit"

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A part of a `raising()` block in which a first signal waits for `poll()`."""
        self._response = "defer"
        try:
            yield
        finally:
            self._response = "raise"


PROCESS_START = time.monotonic()


def elapsed_s() -> float:
    """Seconds since the process began."""
    return time.monotonic() - PROCESS_START


_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """What torchrun tells a process by its environment; the defaults are those of a process alone.

    Attributes:
        rank: of this process among all, from 0.
        world_size: how many there are.
        local_rank: of this process among those of its machine, from 0.
        local_world_size: how many of them are on this machine.
        restarts: how often torchrun has begun the job anew, after a process of it had died.
        job: the job's name, the same after such a restart; empty where there is none.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    restarts: int = 0
    job: str = ""

    @classmethod
    def from_environment(cls) -> "Launch":
        """This process's; raises UsageError where a part of it is missing or makes no sense."""
        if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
            return cls()
        if os.environ.get("WORLD_SIZE") != "1":
            missing = [name for name in _NEEDED if not os.environ.get(name)]
            if missing:
                raise UsageError(
                    f"the environment says that this is one of several processes, but not {', '.join(missing)}: start "
                    "them with torchrun, or unset RANK and WORLD_SIZE for a process alone"
                )
        rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
        local_rank, local_world_size = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
        if not (rank < world_size and local_rank < local_world_size <= world_size):
            raise UsageError(
                f"RANK must be below WORLD_SIZE, and LOCAL_RANK below LOCAL_WORLD_SIZE, got {rank} of {world_size} and "
                f"{local_rank} of {local_world_size}"
            )
        restarts = _number("TORCHELASTIC_RESTART_COUNT", 0)
        return cls(rank, world_size, local_rank, local_world_size, restarts, _job())

    def how_to_go_on(self, folder: Path) -> str:
        """What to type to go on with the run in a folder."""
        program = "python"
        if self.world_size > 1:
            alone = f"--standalone --nproc-per-node {self.world_size}"
            program = f"torchrun {alone if self.local_world_size == self.world_size else '[its options]'}"
        return f"go on with: {program} -m vqae.train --out {shlex.quote(str(folder))} --resume"


def speaks_for_its_machine() -> bool:
    """Whether this process is the one of its machine that prints: the others would say the same."""
    local_rank = os.environ.get("LOCAL_RANK", "0")
    return not (local_rank.isdecimal() and int(local_rank))


def _job() -> str:
    """--rdzv-id; where it was left out ("none"), the folder that torchrun made for the logs of this job alone."""
    job, error_file = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    return error_file.partition("/attempt_")[0] if job == "none" else job


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"{name} must be a number, got {text!r}")
    return int(text)
