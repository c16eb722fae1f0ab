"""The shell around each command: signals, error messages, exit codes, and the environment set by torchrun.

This module must not import torch, so that signals are handled before torch is loaded, which takes seconds.
"""

import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import NoReturn

from vqae.runtime.errors import DivergedError, LostProcessError, UsageError

PROCESS_START = time.monotonic()
COMMANDS = ("train", "evaluate", "reconstruct")


def elapsed_s() -> float:
    """Seconds since the process started."""
    return time.monotonic() - PROCESS_START


def main() -> NoReturn:
    """The console command `vqae`: `vqae train ...` is `python -m vqae.train ...`."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        del sys.argv[1]
        run_command(f"vqae.{name}")
    usage = f"usage: vqae {{{','.join(COMMANDS)}}} [options]\n`vqae COMMAND --help` lists the options of a command."
    if name in ("-h", "--help"):
        print(usage)
        sys.exit(0)
    print(f"{usage}\nerror: the command must be one of {', '.join(COMMANDS)}, got {name!r}", file=sys.stderr)
    sys.exit(2)


def run_command(module_name: str) -> NoReturn:
    """Call main(arguments, signals) of a module and exit.

    The exit code is 0, 2 for a usage error, 1 for a loss that is not finite or a lost process, 130 after SIGINT and 143
    after SIGTERM. One process of each machine prints the error. The module is given by name, so that it and torch are
    imported after the signal handlers are installed.
    """
    signals = SignalHandler()
    signals.install()
    main = import_module(module_name).main
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vqae").setLevel(logging.INFO if _is_local_rank0() else logging.ERROR)
    try:
        with signals.raising():
            main(sys.argv[1:], signals)
            sys.stdout.flush()
    except LostProcessError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # on every rank: any of them may be the only survivor
        os._exit(error.exit_code)  # a regular exit would wait for the lost process
    except (UsageError, DivergedError, Interrupted) as error:
        message = f"stopped by {error}" if isinstance(error, Interrupted) else f"error: {error}"
        if isinstance(error, DivergedError):
            message += "; the last checkpoint, if there is one, is kept\ntry a lower --lr"
        if _is_local_rank0():
            print(message, file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)


def _is_local_rank0() -> bool:
    local_rank = os.environ.get("LOCAL_RANK", "0")
    return not (local_rank.isdecimal() and int(local_rank))


# -- signals


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived. Not an Exception, so that no library's `except Exception` catches it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class SignalHandler:
    """Handles SIGINT and SIGTERM. The second signal exits immediately.

    The first signal raises `Interrupted` where it arrives inside `raising()`, and at the next `poll()` inside
    `deferred()`. Elsewhere, while modules are imported and the interpreter shuts down, it exits immediately, because
    there is nothing to save and an exception would be printed as a traceback of other code.

    Attributes:
        received: the number of the signal that arrived, 0 before any.
    """

    def __init__(self) -> None:
        self.received = 0
        self._response = "exit"

    def install(self) -> None:
        """Install the handler for both signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received or self._response == "exit":
            os._exit(128 + number)
        self.received = number
        if self._response == "raise":
            raise Interrupted(number)

    def poll(self) -> None:
        """Raise `Interrupted` if a signal has arrived."""
        if self.received:
            raise Interrupted(self.received)

    def raising(self) -> AbstractContextManager[None]:
        """A block in which the first signal raises `Interrupted` immediately."""
        return self._responding("raise")

    def deferred(self) -> AbstractContextManager[None]:
        """A part of a `raising()` block in which the first signal waits for `poll()`."""
        return self._responding("defer")

    @contextmanager
    def _responding(self, response: str) -> Iterator[None]:
        before, self._response = self._response, response
        try:
            yield
        finally:
            self._response = before


# -- torchrun

_REQUIRED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """The environment variables of torchrun. The defaults are those of a single process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine
    local_world_size: int = 1
    restarts: int = 0  # how many times torchrun has restarted the job after a process died
    job: str = ""  # name of the job, which restarts keep

    @classmethod
    def from_environment(cls) -> "Launch":
        """Read the environment. Raises UsageError if it is incomplete or inconsistent."""
        if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
            return cls()
        missing = [name for name in _REQUIRED if not os.environ.get(name)]
        if missing and os.environ.get("WORLD_SIZE") != "1":
            raise UsageError(
                f"the environment describes one of several processes, but {', '.join(missing)} is not set: start them "
                "with torchrun, or unset RANK and WORLD_SIZE to run a single process"
            )
        rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
        local_rank, local_world_size = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
        if not (rank < world_size and local_rank < local_world_size <= world_size):
            raise UsageError(
                f"RANK must be below WORLD_SIZE, and LOCAL_RANK below LOCAL_WORLD_SIZE, got {rank} of {world_size} and "
                f"{local_rank} of {local_world_size}"
            )
        # Without --rdzv-id the name is "none". The folder of the job's logs then identifies it.
        job, error_file = (os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "ERROR_FILE"))
        job = error_file.partition("/attempt_")[0] if job == "none" else job
        restarts = _number("TORCHELASTIC_RESTART_COUNT", 0)
        return cls(rank, world_size, local_rank, local_world_size, restarts, job)

    def resume_advice(self, folder: Path) -> str:
        """The command that resumes the run in a folder."""
        program = "python"
        if self.world_size > 1:
            one_machine = self.local_world_size == self.world_size
            program = f"torchrun {f'--standalone --nproc-per-node {self.world_size}' if one_machine else '[options]'}"
        return f"resume with: {program} -m vqae.train --out {shlex.quote(str(folder))} --resume"


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"{name} must be a number, got {text!r}")
    return int(text)
