"""SIGINT and SIGTERM: finish the step, save, say how to go on; a second signal exits at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):  # noqa: N818 - it is a request, not an error
    """The user asked the program to stop."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class SignalHandler:
    """Turns the first SIGINT or SIGTERM into `Interrupted`, and the second into an exit on the spot.

    The exception is raised where the signal arrives, which is safe while nothing is half done; inside `deferred()` it
    waits for `poll()`.
    """

    def __init__(self) -> None:
        self._received = 0
        self._deferred = False

    def install(self) -> None:
        """Begin to handle both signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._received:
            os._exit(128 + number)
        self._received = number
        if not self._deferred:
            raise Interrupted(number)

    def poll(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self._received:
            raise Interrupted(self._received)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A block in which a first signal waits for `poll()`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
