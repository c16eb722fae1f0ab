"""SIGINT and SIGTERM: finish the step, save, say how to go on; a second signal exits at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal


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
