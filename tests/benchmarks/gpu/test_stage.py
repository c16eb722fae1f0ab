"""Commands that stages run: their output, their time limit, and how what other tools print is read."""

import sys
import time
from pathlib import Path

import pytest
from gpu.profiles import read_counters
from gpu.results import ROOT
from gpu.ring import gpu_test_files, read_report
from gpu.sanitizers import read
from gpu.stage import STAGES, Finished, child_environment, run_command, tail

CASES = '{"searches": 12, "launched": ["_scan_kernel"], "missing": []}\n'


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
    assert time.monotonic() - start < 60


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


# -- the sanitizers' output


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
        (0, CASES.replace("[]", '["_drain_kernel"]') + "========= ERROR SUMMARY: 0 errors\n", "failed", 0),
        (1, "Traceback (most recent call last)\n", "failed", None),
        (0, "========= ERROR SUMMARY: 0 errors\n", "failed", 0),
        (None, CASES, "stopped at its time limit", None),
    ],
)
def test_anything_else_is_not_clean(exit_code: int | None, output: str, status: str, errors: int | None) -> None:
    entries = read(Finished(exit_code, output, 1.0))
    assert (entries["status"], entries["errors"], entries["output"]) == (status, errors, output)


# -- the tests' report


def test_a_report_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "tests.xml"
    file.write_text(
        '<testsuites><testsuite><testcase classname="a" name="one"/>'
        '<testcase classname="a" name="two"><failure message="assert 1 == 2">where</failure></testcase>'
        '<testcase classname="a" name="three"><skipped message="no GPU"/></testcase></testsuite></testsuites>'
    )
    found = read_report(file)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, {"no GPU": 1})
    assert found["failures"] == [{"test": "a::two", "text": "assert 1 == 2\nwhere"}]


def test_the_tests_for_a_gpu_are_found() -> None:
    files = gpu_test_files()
    assert ROOT / "tests" / "vq_kernels" / "search" / "test_triton_gpu.py" in files
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
