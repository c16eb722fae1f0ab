"""Plain lines where there is no terminal, a bar where there is one."""

import io
import re
import sys

import pytest

from vqae.training.report import ProgressReporter


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_what_is_shown(monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]) -> None:
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    reporter = ProgressReporter(0.25)
    reporter.show(0.5, (1.5, 0.75), 308)
    reporter.close()
    text = shown.getvalue()
    for part in ("50%", "reconstruction 1.5000", "codebook 0.7500", "codes used 308", "0:00 left"):
        assert part in text
    assert ("|" in text) == (stream is Terminal)
    assert text.endswith("\n")


def test_the_time_left_is_estimated_by_the_pace_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, now = io.StringIO(), [100.0]
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    reporter = ProgressReporter(0.2)  # of a resumed run
    now[0] += 90
    assert reporter.due()
    reporter.show(0.5, (1.0, 1.0), 1)
    assert "2:30 left" in shown.getvalue()
    assert not reporter.due()


def test_lines_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ProgressReporter(0.0)
    reporter.line("epoch 1")
    assert capsys.readouterr().out == "epoch 1\n"


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_warnings_go_to_stderr_on_a_line_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stream: type[io.StringIO]
) -> None:
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    reporter = ProgressReporter(0.5)
    reporter.line("warning: few codes", sys.stderr)
    reporter.close()
    assert "warning: few codes" in re.split(r"[\r\n]", shown.getvalue())
    assert capsys.readouterr().out == ""
