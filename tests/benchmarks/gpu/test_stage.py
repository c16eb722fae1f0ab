"""Commands that stages run: their output, their time limit, and how what other tools print is read."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from child_processes import descendants, end, killed_with_parent
from gpu import profiles, ring, sanitizers
from gpu.commands import Finished, child_environment, run_command, tail
from gpu.precompile import end_pool
from gpu.profiles import read_counters
from gpu.results import ROOT, make_header
from gpu.ring import gpu_test_files
from gpu.sanitizers import read
from gpu.stage import FINISHED, STAGES, Context, Pace

CASES = '{"searches": 12, "launched": ["_scan_kernel"], "missing": []}\n'


def make_context(folder: Path, *, rehearse: bool = True) -> Context:
    header = make_header((), "abc", rehearse=True)
    return Context(out=folder, work=folder, header=header, deadline=time.monotonic() + 600, rehearse=rehearse)


def test_a_command_runs_in_the_checkout_and_both_streams_are_kept() -> None:
    program = "import os, sys; print(os.getcwd()); print(os.environ['ANSWER'], file=sys.stderr); sys.exit(3)"
    finished = run_command([sys.executable, "-c", program], seconds=60, ANSWER="42")
    assert finished.exit_code == 3
    assert set(finished.output.split()) == {str(ROOT), "42"}


def test_a_command_is_ended_at_its_time_limit_with_all_it_started() -> None:
    start = time.monotonic()
    finished = run_command(["sh", "-c", "echo begun; sleep 600 & sleep 600"], seconds=0.5)
    assert finished.exit_code is None
    assert finished.output == "begun\n"
    assert time.monotonic() - start < 30


IN_A_SESSION = """
import signal, subprocess, sys
{setup}
process = subprocess.Popen([sys.executable, "-c", "{child}"], start_new_session=True)
print(process.pid, flush=True)
{work}
"""


@pytest.mark.parametrize("setup", ["pass", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"], ids=["polite", "deaf"])
def test_what_has_left_the_group_is_ended_too_and_holds_nothing_up(setup: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark whose training run, in a session of its own, holds its output open."""
    monkeypatch.setattr(end, "__defaults__", (0.5,))
    program = IN_A_SESSION.format(setup=setup, child="import time; time.sleep(600)", work="process.wait()")
    start = time.monotonic()
    finished = run_command([sys.executable, "-c", program], seconds=1.5)
    assert finished.exit_code is None
    assert time.monotonic() - start < 30
    assert not Path(f"/proc/{int(finished.output)}").exists() or is_zombie(int(finished.output))


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_command_that_is_asked_to_stop_may_still_save() -> None:
    program = """
import signal, sys, time
def save(*_): time.sleep(0.3); print("saved", flush=True); sys.exit(143)
signal.signal(signal.SIGTERM, save)
time.sleep(600)
"""
    assert run_command([sys.executable, "-c", program], seconds=1.5).output == "saved\n"


def test_the_processes_of_a_process_are_found() -> None:
    with subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert descendants(process.pid) == [child]
        assert {process.pid, child} <= set(descendants(os.getpid()))
        os.kill(child, signal.SIGKILL)


def test_pieces_are_done_while_there_is_time_for_their_kind(tmp_path: Path) -> None:
    here = dataclasses.replace(make_context(tmp_path), deadline=time.monotonic() + 30)
    assert not Pace(here).do(lambda: pytest.fail("60 s are kept for what was never done"), "a kind")
    pace = Pace(here, first_s=20)
    assert pace.do(lambda: time.sleep(0.01), "a kind")
    late = dataclasses.replace(here, deadline=time.monotonic() + 6)
    pace._context = late
    assert pace.do(lambda: None, "a kind")  # 1.5 times the longest of its kind, and 5 s
    assert not pace.do(lambda: pytest.fail("never done"), "another kind")


def test_kernels_that_are_not_compiled_in_time_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=killed_with_parent)
    pool.submit(time.sleep, 600)
    for _ in range(3):
        pool.submit(time.sleep, 600)
    processes = [*pool._processes.values()]
    start = time.monotonic()
    end_pool(pool)
    assert not any(process.is_alive() for process in processes)
    assert time.monotonic() - start < 30


def test_the_checkout_comes_first_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    environment = child_environment(TRITON_CACHE_DIR="here")
    assert environment["PYTHONPATH"].split(":") == [str(ROOT), str(ROOT / "benchmarks"), "elsewhere"]
    assert environment["TRITON_CACHE_DIR"] == "here"


def test_only_the_end_of_a_long_output_is_kept() -> None:
    assert tail("abcdef", 3) == "...def"
    assert tail("abc", 3) == "abc"


def test_every_stage_keeps_below_eight_minutes_and_depends_on_folders_that_exist() -> None:
    for stage in STAGES:
        assert 0 < stage.minutes < 8
        assert all((ROOT / folder).is_dir() for folder in stage.folders)


# -- the sanitizers


def test_a_clean_run_of_all_kernels_is_clean() -> None:
    output = f"========= COMPUTE-SANITIZER\n{CASES}========= ERROR SUMMARY: 0 errors\n"
    entries = read(Finished(0, output, 1.25))
    assert (entries["status"], entries["errors"], entries["missing"], entries["seconds"]) == ("clean", 0, [], 1.2)
    assert "output" not in entries


@pytest.mark.parametrize(
    ("exit_code", "output", "status", "errors"),
    [
        (9, f"{CASES}========= ERROR SUMMARY: 3 errors\n", "errors found", 3),
        (0, f"{CASES}========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n", "errors found", 2),
        (0, CASES.replace("[]", '["_exhaustive_kernel"]') + "========= ERROR SUMMARY: 0 errors\n", "failed", 0),
        (1, "Traceback (most recent call last)\n", "failed", None),
        (0, "========= ERROR SUMMARY: 0 errors\n", "failed", 0),
        (None, CASES, "stopped at its time limit", None),
    ],
)
def test_anything_else_is_not_clean(exit_code: int | None, output: str, status: str, errors: int | None) -> None:
    entries = read(Finished(exit_code, output, 1.0))
    assert (entries["status"], entries["errors"], entries["output"]) == (status, errors, output)


def test_memcheck_takes_no_answer_of_an_api_for_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run_command(command: list[str], seconds: float, **environment: str) -> Finished:
        commands.append(" ".join(map(str, command)))
        return Finished(0, f"{CASES}========= ERROR SUMMARY: 0 errors\n", 1.0)

    monkeypatch.setattr(sanitizers, "run_command", run_command)
    monkeypatch.setattr(sanitizers.shutil, "which", lambda name: name)
    assert sanitizers.run(make_context(tmp_path)) == FINISHED
    assert "--tool memcheck --padding 64 --report-api-errors no" in commands[1]
    assert "--tool racecheck --kernel-name" in commands[2]


# -- the tests


TESTS = """
import pytest
def test_one(): pass
@pytest.mark.gpu
@pytest.mark.parametrize("number", [1, 2])
def test_two(number): assert number == 1, "broken"
@pytest.mark.gpu
@pytest.mark.skipif(True, reason="one GPU")
def test_three(): pass
@pytest.mark.gpu
def test_four(broken): pass
@pytest.fixture
def broken(): raise RuntimeError("no setup")
"""


def test_tests_are_lines_as_they_end_and_those_that_passed_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(ring, "gpu_test_files", lambda: [file])
    here = make_context(tmp_path)
    outcome = ring.run(here)
    assert outcome == "failed: the tests failed, 1 passed, 2 failed; see checks.jsonl"
    lines = {line["test"].rpartition("::")[2]: line for line in here.results("checks").matching(op="test")}
    assert {name: line["outcome"] for name, line in lines.items()} == {
        "test_two[1]": "passed", "test_two[2]": "failed", "test_three": "skipped", "test_four": "failed"}  # fmt: skip
    assert "assert 2 == 1" in lines["test_two[2]"]["text"]
    assert "no setup" in lines["test_four"]["text"]
    assert lines["test_three"]["text"] == "one GPU"
    file.write_text(TESTS.replace("number == 1", "number").replace('raise RuntimeError("no setup")', "pass"))
    assert ring.run(here) == FINISHED
    tests = [line["test"].rpartition("::")[2] for line in here.results("checks").matching(op="test")]
    assert sorted(tests) == ["test_four", "test_four", "test_three", "test_two[1]", "test_two[2]", "test_two[2]"]
    last = list(here.results("checks").matching(op="tests"))[-1]
    assert (last["passed"], last["failed"], last["skipped"]) == (3, 0, {"one GPU": 1})


def test_a_ring_that_dies_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "test_some.py"
    file.write_text("import os, pytest\npytestmark = pytest.mark.gpu\n"
                    "def test_a(): pass\ndef test_b(): os._exit(7)\n")  # fmt: skip
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(ring, "gpu_test_files", lambda: [file])
    assert ring.run(make_context(tmp_path)).startswith("failed: the tests failed, 1 passed, 0 failed")


def test_the_tests_for_a_gpu_are_found() -> None:
    files = gpu_test_files()
    assert ROOT / "tests" / "vq_kernels" / "search" / "test_triton_gpu.py" in files
    assert ROOT / "tests" / "vq_kernels" / "search" / "test_attack.py" in files
    assert ROOT / "tests" / "vqae" / "test_model.py" not in files


# -- Nsight Compute's figures


def test_counters_are_read_by_section() -> None:
    output = (
        '==PROF== Connected\n"ID","Section Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","Occupancy","Registers Per Thread","register/thread","128"\n'
        '"0","SpeedOfLight","Duration","us","1,234.5"\n"0","Rules","","",""\n'
    )
    assert read_counters(output) == {
        "Occupancy: Registers Per Thread [register/thread]": "128",
        "SpeedOfLight: Duration [us]": "1,234.5",
    }
    assert read_counters("==ERROR== no counters") == {}


def test_a_profiler_that_hangs_leaves_the_stage_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def run_command(command: list[str], seconds: float) -> Finished:
        given.append(seconds)
        return Finished(None, "", seconds)

    monkeypatch.setattr(profiles, "run_command", run_command)
    monkeypatch.setattr(profiles.shutil, "which", lambda name: name)
    here = make_context(tmp_path, rehearse=False)
    profiles.profile_counters(here.results("tiles"), here, (256, 512, 512))
    assert given == [75]
