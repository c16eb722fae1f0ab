"""The shell around each command: output, signals, error messages, exit codes, and the environment set by torchrun.

This module must not import torch, so that signals are handled before torch is loaded, which takes seconds.
"""

import errno
import io
import logging
import math
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
from typing import Any, NoReturn

from vqae.runtime.errors import DivergedError, LostProcessError, UsageError

PROCESS_START = time.monotonic()
COMMANDS = ("train", "evaluate", "reconstruct")


def elapsed_s() -> float:
    """Seconds since the process started."""
    return time.monotonic() - PROCESS_START


def program(command: str) -> str:
    """The program as it was started: `vqae train` or `python -m vqae.train`."""
    is_console_command = Path(sys.argv[0]).name in ("vqae", "vqae.exe")
    return f"vqae {command}" if is_console_command else f"python -m vqae.{command}"


def main() -> NoReturn:
    """The console command `vqae`: `vqae train ...` is `python -m vqae.train ...`."""
    guard_output()
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

    The exit code is 0, 2 for a usage error, 1 for a loss that is not finite or a lost process, 130 after SIGINT, 143
    after SIGTERM and 129 after SIGHUP, whether or not anything can be printed. One process of each machine prints the
    error. The module is given by name, so that it and torch are imported after the signal handlers are installed.
    """
    guard_output()
    signals = SignalHandler()
    signals.install()
    main = import_module(module_name).main
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vqae").setLevel(logging.INFO if _is_local_rank0() else logging.ERROR)
    exit_code = 0
    try:
        with signals.raising():
            main(sys.argv[1:], signals)
    except LostProcessError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # on every rank: any of them may be the only survivor
        os._exit(error.exit_code)  # a regular exit would wait for the lost process
    except (UsageError, DivergedError, Interrupted) as error:
        message = f"stopped by {error}" if isinstance(error, Interrupted) else f"error: {error}"
        if isinstance(error, DivergedError):
            message += "; the last checkpoint, if there is one, is kept\ntry a lower --lr"
        if _is_local_rank0():
            print(message, file=sys.stderr)
        exit_code = error.exit_code
    sys.exit(exit_code)


def _is_local_rank0() -> bool:
    local_rank = os.environ.get("LOCAL_RANK", "0")
    return not (local_rank.isdecimal() and int(local_rank))


# -- standard output and error


class _StandardStream(io.FileIO):
    """File descriptor 1 or 2. After a write that fails, it is the null device."""

    def write(self, data: Any, /) -> int:
        """Write the bytes-like data, or drop it. Returns the number of bytes that are dealt with."""
        size = memoryview(data).nbytes
        try:
            return super().write(data) or size  # None if a pipe that must not be waited for is full
        except OSError as error:
            with open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), self.fileno())  # for other libraries and the interpreter's last flush too
            if self.fileno() == 1 and error.errno != errno.EPIPE:  # whoever closes a pipe has read enough
                print(f"warning: standard output cannot be written: {error.strerror}", file=sys.stderr)
            return size


def guard_output() -> None:
    """Make the command independent of its standard streams.

    A stream that is closed, full or without a reader becomes the null device. Characters that the encoding of a stream
    does not have are escaped. `sys.stdout` and `sys.stderr` are left alone if they have been replaced, for example by
    `contextlib.redirect_stdout`.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # otherwise the next file to be opened would get this number, and all that is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # open() takes the lowest free number: this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            encoding = "utf-8" if stream is None else stream.encoding
            buffer = io.BufferedWriter(_StandardStream(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True))


# -- signals

_SIGHUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # the terminal has gone; Windows has no such signal
_REPEATED_WITHIN_S = 1.0


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived. Not an Exception, so that no library's `except Exception` catches it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class SignalHandler:
    """Handles SIGINT, SIGTERM and SIGHUP. The second signal exits immediately.

    The first signal raises `Interrupted` where it arrives inside `raising()`, and at the next `poll()` inside
    `deferred()`. Elsewhere, while modules are imported and the interpreter shuts down, it exits immediately, because
    there is nothing to save and an exception would be printed as a traceback of other code.

    A repetition within a second of the first signal is ignored: a shell that ends repeats SIGHUP, and torchrun passes
    on the signal that a terminal has sent to all processes.

    Attributes:
        received: the number of the signal that arrived, 0 before any.
    """

    def __init__(self) -> None:
        self.received = 0
        self._received_at = -math.inf
        self._response = "exit"

    def install(self) -> None:
        """Install the handler for the signals. SIGHUP stays ignored under nohup."""
        for number in (signal.SIGINT, signal.SIGTERM, _SIGHUP):
            if number != _SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        repeated = number == _SIGHUP or (number == self.received and "TORCHELASTIC_RUN_ID" in os.environ)
        if repeated and time.monotonic() - self._received_at < _REPEATED_WITHIN_S:
            return
        if self.received or self._response == "exit":
            os._exit(128 + number)
        self.received, self._received_at = number, time.monotonic()
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
        start = program("train")
        if self.world_size > 1:
            one_machine = self.local_world_size == self.world_size
            options = f"--standalone --nproc-per-node {self.world_size}" if one_machine else "[options]"
            start = f"torchrun {options} -m vqae.train"
        return f"resume with: {start} --out {shlex.quote(str(folder))} --resume"


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"{name} must be a number, got {text!r}")
    return int(text)
