"""The command for a GPU: its dry run, and how it reports failures."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import DRY, Context, Options, problems, run
from benchmarks.results import ROOT, read_rows


@pytest.mark.timeout(900)
def test_a_dry_run_goes_through_everything(tmp_path: Path) -> None:
    file = tmp_path / "new" / "gpu.jsonl"
    finished = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--dry-run", "--out", str(file)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    log = file.with_suffix(".log")
    assert finished.returncode == 0, finished.stdout + finished.stderr + log.read_text()[-3000:]
    rows = read_rows(file)
    assert all(row["dry_run"] and row["device"] and row["commit"] for row in rows)
    parts = {row["part"]: row["status"] for row in rows if row["op"] == "part"}
    assert parts == dict.fromkeys(("checks", "times", "train", "exactness", "suite"), "finished")
    by_op: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_op.setdefault(row["op"], []).append(row)
    first_checks, suite = by_op["tests"]
    assert first_checks["passed"] > 30
    assert first_checks["failed"] == suite["failed"] == 0
    assert [row["certified_percent"] for row in by_op["shares"]] == [100, 100]
    ours = [row for row in by_op["nearest_code"] if row["contender"] == "triton"]
    assert [(row["status"], row["wrong_percent"], row["graph"]) for row in ours] == [
        ("ok", 0, False), ("ok", 0, False), ("ok", 0, True),
    ]  # fmt: skip
    steps = {(row["contender"], row["dtype"]): row for row in by_op["training_step"]}
    assert len(steps) == 6
    assert all(row["status"] == "ok" and row["p50_ms"] > 0 for row in steps.values())
    assert [row["contender"] for row in by_op["training"]] == ["vqae.train", "plain PyTorch"]
    assert all(row["images_per_s"] > 0 for row in by_op["training"])
    (exact,) = by_op["exactness"]
    assert (exact["rows"], exact["wrong"]) == (10, 0)
    assert sum(row["chosen"] for row in by_op["config"]) == 1
    assert {row["status"] for row in by_op["config"]} == {"ok"}
    assert [row["status"] for row in by_op["sanitizer"]] == ["not run"]
    assert len(finished.stdout.splitlines()) < 75  # one page
    assert "this library, exact" in finished.stdout


def context_of(tmp_path: Path) -> Context:
    where = {"dry_run": True, "device": "a CPU"}
    return Context(Options(dry_run=True), tmp_path / "gpu.jsonl", time.time() + 60, where, DRY, torch.device("cpu"))


def fail(_context: Context) -> None:
    raise RuntimeError("broken")


def hang(_context: Context) -> None:
    child = subprocess.Popen(["sleep", "600"])
    print(child.pid, flush=True)
    child.wait()


def test_a_failing_and_a_hanging_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_PARTS", {**gpu._PARTS, "checks": fail, "times": hang})
    monkeypatch.setattr(gpu, "_GRACE_S", 0.0)
    file = tmp_path / "gpu.jsonl"
    for part, minutes in (("checks", 5.0), ("times", 0.1), ("train", 0.0)):
        run(Options(dry_run=True, parts=(part,), minutes=minutes), file)
    statuses = [(row["part"], row["status"]) for row in read_rows(file)]
    assert statuses == [
        ("checks", "failed with exit code 1"),
        ("times", "stopped at its time limit"),
        ("train", "no time left"),
    ]
    assert problems(read_rows(file)) == [f"{part}: {status}" for part, status in statuses]
    log = file.with_suffix(".log").read_text()
    assert "RuntimeError: broken" in log
    state = Path(f"/proc/{int(log.split()[-1])}/stat")  # the processes that the part started are gone too
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_wrong_indices_and_failed_tests_are_problems(tmp_path: Path) -> None:
    context = context_of(tmp_path)
    context.add("config", config="short", status="WRONG")
    context.add("exactness", rows=10, wrong=1)
    context.add("exactness", rows=10, wrong=0)
    context.add("failure", test="tests/gpu/test_x.py::test_y")
    context.add("sanitizer", tool="memcheck", status="errors found")
    context.add("sanitizer", tool="racecheck", status="clean")
    found = problems(read_rows(context.file))
    assert found[0].startswith('wrong indices: {"op": "config"')
    assert found[1:] == ["1 of 10 rows are wrong", "failed: tests/gpu/test_x.py::test_y", "memcheck: errors found"]


@pytest.mark.parametrize(
    ("exit_code", "output", "status", "errors"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", "clean", 0),
        (9, "========= ERROR SUMMARY: 3 errors", "errors found", 3),
        (0, "========= RACECHECK SUMMARY: 2 hazards displayed", "errors found", 2),
        (1, "Traceback", "failed", 0),
    ],
)
def test_what_a_sanitizer_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exit_code: int, output: str, status: str, errors: int
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '{output}'\nexit {exit_code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    context = context_of(tmp_path)
    gpu._sanitize(Context(Options(), *list(vars(context).values())[1:]))
    rows = read_rows(context.file)
    assert [row["tool"] for row in rows] == ["memcheck", "racecheck"]
    assert {(row["status"], row["errors"]) for row in rows} == {(status, errors)}
    assert all(("output" in row) == (status != "clean") for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_dry_run_is_possible(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(Options()) == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert gpu.main(Options(dry_run=True, out=tmp_path / "file" / "gpu.jsonl")) == 2
    assert "--out must be a writable file" in capsys.readouterr().err


def test_rows_are_json(tmp_path: Path) -> None:
    context = context_of(tmp_path)
    context.add("tests", passed=1)
    assert json.loads(context.file.read_text()) == {"op": "tests", "passed": 1, "dry_run": True, "device": "a CPU"}
