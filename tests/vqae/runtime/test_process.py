"""What a signal does, by where it arrives."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from vqae.runtime import process
from vqae.runtime.process import Interrupted, SignalHandler

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
each = pytest.mark.parametrize("number", EXIT_CODES)


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


@each
def test_the_first_signal_raises_in_a_raising_block(signals: SignalHandler, number: signal.Signals) -> None:
    with pytest.raises(Interrupted, match=number.name) as interrupted, signals.raising():
        signal.raise_signal(number)
    assert interrupted.value.exit_code == EXIT_CODES[number]


@each
def test_a_deferred_signal_waits_for_poll(signals: SignalHandler, number: signal.Signals) -> None:
    with signals.raising(), signals.deferred():
        signals.poll()
        signal.raise_signal(number)
        with pytest.raises(Interrupted, match=number.name):
            signals.poll()


@each
def test_a_second_signal_exits_at_once(
    signals: SignalHandler, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    with signals.raising(), signals.deferred():
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(process, "_REPEATED_WITHIN_S", 0)  # a second later
        with pytest.raises(ExitedAtOnce, match=str(EXIT_CODES[number])):
            signal.raise_signal(number)


@pytest.mark.parametrize(
    ("first", "second", "ignored"),
    [
        (signal.SIGHUP, signal.SIGHUP, True),  # by the kernel and by a shell
        (signal.SIGTERM, signal.SIGHUP, True),  # by systemd
        (signal.SIGINT, signal.SIGINT, False),
        (signal.SIGTERM, signal.SIGINT, False),
    ],
)
@pytest.mark.parametrize("torchrun", [False, True])
def test_a_repetition_of_the_first_signal_is_ignored(
    signals: SignalHandler,
    monkeypatch: pytest.MonkeyPatch,
    first: signal.Signals,
    second: signal.Signals,
    ignored: bool,
    torchrun: bool,
) -> None:
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this job")
        ignored = ignored or first == second
    with signals.raising(), signals.deferred():
        signal.raise_signal(first)
        with contextlib.nullcontext() if ignored else pytest.raises(ExitedAtOnce):
            signal.raise_signal(second)
        with pytest.raises(Interrupted, match=first.name):
            signals.poll()


def test_sighup_stays_ignored_under_nohup(signals: SignalHandler) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        SignalHandler().install()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@each
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


@pytest.mark.parametrize(("first", "second"), [(signal.SIGINT, signal.SIGTERM), (signal.SIGHUP, signal.SIGINT)])
def test_the_process_really_ends_at_the_second_signal(first: signal.Signals, second: signal.Signals) -> None:
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
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        for line, number in ((b"ready\n", first), (b"received\n", second)):
            assert running.stdout.readline() == line
            running.send_signal(number)
        _, err = running.communicate(timeout=30)
    assert (running.returncode, err) == (EXIT_CODES[second], b"")
