"""Exit codes and messages around the work of a command."""

import logging
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
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
        (lambda: signal.raise_signal(signal.SIGHUP), 129, "stopped by SIGHUP\n"),
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
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
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


# -- the console command

SCRIPT = "import sys; from vqae.runtime.process import main; sys.argv[0] = 'vqae'; sys.exit(main())"  # as pip writes it


def run_script(code: str, *arguments: str) -> Outcome:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_the_entry_point_is_the_console_command() -> None:
    pyproject = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert pyproject["project"]["scripts"] == {"vqae": f"{process.main.__module__}:{process.main.__name__}"}


def test_the_console_command_runs_a_command() -> None:
    outcome = run_script(SCRIPT, "evaluate", "--checkpoint", "none.pt")
    assert outcome == Outcome(2, "", "error: checkpoint none.pt cannot be read: No such file or directory\n")


@pytest.mark.parametrize("name", process.COMMANDS)
def test_the_console_command_handles_signals_before_torch_loads(name: str) -> None:
    code = (
        "import signal, vqae.runtime.process as process\n"
        "def loading(name):\n"
        "    assert 'torch' not in sys.modules\n"
        f"    assert (name, sys.argv) == ('vqae.{name}', ['vqae', '--one', '2'])\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "process.import_module = loading\n"
    )
    assert run_script(f"import sys\n{code}{SCRIPT}", name, "--one", "2") == Outcome(130, "", "")


def test_the_console_command_names_its_commands() -> None:
    for arguments, exit_code in (((), 2), (("tune",), 2), (("--help",), 0)):
        outcome = run_script(SCRIPT, *arguments)
        assert outcome.exit_code == exit_code
        assert "vqae {train,evaluate,reconstruct}" in (outcome.out if exit_code == 0 else outcome.err)
        assert ("error: the command must be one of" in outcome.err) == (exit_code == 2)
