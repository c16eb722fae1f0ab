"""Exit codes and messages around the work of a command."""

import logging
import signal
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from tests.vqae.commands import Outcome
from vqae.runtime import process
from vqae.runtime.errors import DivergedError, UsageError
from vqae.runtime.process import SignalHandler


def run(command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, work: Callable[[], None]) -> Outcome:
    """The outcome of a command that does `work`."""

    def main(arguments: list[str], _signals: SignalHandler) -> None:
        assert arguments == ["--one", "2"]
        work()

    monkeypatch.setattr(process, "import_module", lambda name: SimpleNamespace(main=main))
    return command("vqae.test", "--one", 2)


def fail(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "exit_code", "message"),
    [
        (lambda: None, 0, ""),
        (fail(UsageError("--lr must be above 0")), 2, "error: --lr must be above 0\n"),
        (
            fail(DivergedError("a loss was not finite at step 3")),
            1,
            "error: a loss was not finite at step 3; the last checkpoint, if there is one, is kept\ntry a lower --lr\n",
        ),
        (lambda: signal.raise_signal(signal.SIGINT), 130, "stopped by SIGINT\n"),
        (lambda: signal.raise_signal(signal.SIGTERM), 143, "stopped by SIGTERM\n"),
    ],
)
def test_exit_codes_and_messages(
    command: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[], None],
    exit_code: int,
    message: str,
) -> None:
    assert run(command, monkeypatch, work) == Outcome(exit_code, "", message)


def test_other_exceptions_are_not_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    main = fail(ZeroDivisionError("a bug"))
    monkeypatch.setattr(process, "import_module", lambda name: SimpleNamespace(main=lambda *_: main()))
    try:
        with pytest.raises(ZeroDivisionError, match="a bug"):
            process.run_command("vqae.test")
    finally:
        logging.getLogger("vqae").setLevel(logging.NOTSET)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_nothing_slow_is_imported_before_signals_are_handled() -> None:
    code = (
        "import sys, vqae.runtime.process; assert not {'torch', 'numpy', 'tyro', 'vqae.model.vqae'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_package_exports_only_the_model() -> None:
    import vqae
    from vqae.model.vqae import VQAE

    assert vqae.VQAE is VQAE
    with pytest.raises(AttributeError, match="module 'vqae' has no attribute 'VQVAE'"):
        vqae.VQVAE  # noqa: B018
