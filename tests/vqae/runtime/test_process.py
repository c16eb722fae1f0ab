"""What a signal does, by where it arrives."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from vqae.runtime.process import Interrupted, SignalHandler

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
both = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


class ExitedAtOnce(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[SignalHandler]:
    def exit_at_once(code: int) -> None:
        raise ExitedAtOnce(code)

    monkeypatch.setattr(os, "_exit", exit_at_once)
    before = {number: signal.getsignal(number) for number in EXIT_CODES}
    handler = SignalHandler()
    handler.install()
    yield handler
    for number, action in before.items():
        signal.signal(number, action)


@both
def test_the_first_signal_raises_in_a_raising_block(signals: SignalHandler, number: signal.Signals) -> None:
    with pytest.raises(Interrupted, match=number.name) as interrupted, signals.raising():
        signal.raise_signal(number)
    assert interrupted.value.exit_code == EXIT_CODES[number]


@both
def test_a_deferred_signal_waits_for_poll(signals: SignalHandler, number: signal.Signals) -> None:
    with signals.raising(), signals.deferred():
        signals.poll()
        signal.raise_signal(number)
        with pytest.raises(Interrupted, match=number.name):
            signals.poll()


@both
def test_a_second_signal_exits_at_once(signals: SignalHandler, number: signal.Signals) -> None:
    with signals.raising(), signals.deferred():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(ExitedAtOnce, match=str(EXIT_CODES[number])):
            signal.raise_signal(number)


@both
def test_outside_the_blocks_the_first_signal_exits_at_once(signals: SignalHandler, number: signal.Signals) -> None:
    with pytest.raises(ExitedAtOnce, match=str(EXIT_CODES[number])):
        signal.raise_signal(number)
    with signals.raising(), signals.deferred():
        pass
    with pytest.raises(ExitedAtOnce, match=str(EXIT_CODES[number])):
        signal.raise_signal(number)


def test_signals_raise_again_after_a_deferred_block(signals: SignalHandler) -> None:
    with signals.raising():
        with signals.deferred():
            pass
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)


def test_interrupted_is_not_an_exception() -> None:
    assert not issubclass(Interrupted, Exception)


def test_the_process_really_ends_at_the_second_signal() -> None:
    code = """
import time
from vqae.runtime.process import SignalHandler

signals = SignalHandler()
signals.install()
with signals.raising(), signals.deferred():
    print("ready", flush=True)
    while not signals.received:
        time.sleep(0.01)
    print("received", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line, number in ((b"ready\n", signal.SIGINT), (b"received\n", signal.SIGTERM)):
            assert process.stdout.readline() == line
            process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (143, b"")
