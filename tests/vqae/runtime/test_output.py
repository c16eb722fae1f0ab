"""Commands whose standard output or error is closed, full, without a reader, or of another alphabet."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vqae.commands import TIMING_KEYS

CODE = """
import logging, os, sys, warnings
from vqae.runtime.process import guard_output

guard_output()
logging.basicConfig()
with open("result", "w") as result:
    for _ in range(3):
        print("путь-图")
        print("путь-图", file=sys.stderr)
        logging.warning("путь-图")
        warnings.warn("путь-图")
    os.write(1, b"of a library")
    os.write(2, b"of a library")
    sys.stdout.write("without a line end")
    print(result.fileno(), file=result)
"""
SITUATIONS = ("", ">&-", "2>&-", "<&- >&- 2>&-", "| head -c 1", "2>&1 | head -c 1", ">/dev/full", "2>/dev/full")
pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


def shell(redirection: str, *arguments: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run Python in a shell that redirects its output, for example by ">&-", and return the exit code of Python."""
    command = f'{{ "$@"; echo $? > status; }} {redirection}' if "|" in redirection else f'"$@" {redirection}'
    done = subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        cwd=folder,
        capture_output=True,
        timeout=120,
    )
    if "|" in redirection:
        done.returncode = int((folder / "status").read_text())
    return done


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("redirection", SITUATIONS)
def test_printing_never_ends_a_command(redirection: str, encoding: str, tmp_path: Path) -> None:
    done = shell(redirection, "-c", CODE, folder=tmp_path, PYTHONIOENCODING=encoding, LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stdout + done.stderr
    assert b"Exception ignored" not in done.stderr
    assert int((tmp_path / "result").read_text()) > 2  # what libraries print to 1 and 2 does not land in it
    if not redirection:
        assert "путь-图".encode(encoding, "backslashreplace") + b"\n" in done.stdout
        assert done.stdout.endswith(b"without a line end")
    lost = b"warning: standard output cannot be written: No space left on device\n"
    assert done.stderr.count(lost) == (redirection == ">/dev/full")


def test_output_that_has_been_redirected_is_left_alone(tmp_path: Path) -> None:
    code = (
        "import contextlib, io, sys; from vqae.runtime.process import guard_output\n"
        "with contextlib.redirect_stdout(io.StringIO()) as text:\n"
        "    guard_output(); guard_output(); print('kept')\n"
        "sys.exit(text.getvalue() != 'kept\\n')"
    )
    assert shell("", "-c", code, folder=tmp_path).returncode == 0


def test_a_pipe_that_is_full_is_not_waited_for(tmp_path: Path) -> None:
    code = (
        "import os; from vqae.runtime.process import guard_output\n"
        "os.set_blocking(1, False); guard_output()\n"
        "for _ in range(100): print('x' * 10_000)\n"
        "open('result', 'w').close()"
    )
    read_end, write_end = os.pipe()
    try:
        process = [sys.executable, "-c", code]
        subprocess.run(process, stdout=write_end, cwd=tmp_path, check=True, timeout=60)
    finally:
        os.close(read_end)
        os.close(write_end)
    assert (tmp_path / "result").exists()


def test_the_help_may_be_cut_off(tmp_path: Path) -> None:
    script = "import sys; from vqae.runtime.process import main; sys.argv[0] = 'vqae'; main()"
    done = shell("| head -n 1", "-c", script, "--help", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"usage: vqae {train,evaluate,reconstruct} [options]\n"


# -- whole commands


def test_a_run_that_cannot_print_is_complete(tiny: tuple[str, ...], finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "путь-图"
    done = shell("2>&- | head -c 1", "-m", "vqae.train", *tiny, "--out", out, folder=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")

    def results(folder: Path) -> tuple[set[str], list[dict[str, object]]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        without_timings = [{key: value for key, value in line.items() if key not in TIMING_KEYS} for line in lines]
        return {file.name for file in folder.iterdir()}, without_timings

    assert results(out) == results(finished_run)
    assert next((out / "events").iterdir()).stat().st_size > 1000


def test_reconstruct_to_a_path_in_another_alphabet(finished_run: Path, images: Path, tmp_path: Path) -> None:
    image = next((images / "test" / "colours").iterdir())
    arguments = ("--checkpoint", finished_run / "best.pt", image, "--out", tmp_path / "путь" / "图.png")
    done = shell("2>&-", "-m", "vqae.reconstruct", *arguments, folder=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "путь" / "图.png").stat().st_size > 1000
    assert done.stdout.endswith(rb"\u043f\u0443\u0442\u044c/\u56fe.png" + b"\n")
