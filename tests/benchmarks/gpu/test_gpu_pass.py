"""The GPU pass: rehearsed as a whole, gone on with where it stopped, and what it refuses."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gpu_pass
import pytest
from gpu.results import ROOT, Results, make_header, read_lines
from gpu.stage import FINISHED, STAGES, Context

TOLD_APART = {"gpu", "driver", "cuda", "python", "torch", "triton", "peers", "commit", "sources", "date", "rehearsal"}


def rehearse(out: Path, work: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_pass.py"), "--rehearse", "--out", str(out)]
    return subprocess.run(
        [*command, "--work", str(work), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a rehearsal, every stage in one process."""
    out, work = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("work")
    finished = rehearse(out, work, "--here", "--commit", "abc", "--minutes", "30")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return out


@pytest.mark.timeout(900)
def test_a_rehearsal_goes_through_every_stage(rehearsed: Path) -> None:
    outcomes = {line["stage"]: line["outcome"] for line in read_lines(rehearsed / "stages.jsonl")}
    assert list(outcomes) == [stage.name for stage in STAGES]
    assert all(gpu_pass.is_settled(outcome) for outcome in outcomes.values()), outcomes
    files = sorted(rehearsed.iterdir())
    assert len(files) <= 8
    for file in files:
        for line in read_lines(file):
            if file.name != "rate_distortion.jsonl":  # whose lines are the benchmark's own
                assert set(line) >= TOLD_APART
                assert line["rehearsal"] is True
                assert line["commit"] == "abc"


@pytest.mark.timeout(900)
def test_a_rehearsal_finds_nothing_wrong(rehearsed: Path) -> None:
    exactness = read_lines(rehearsed / "exactness.jsonl")
    assert {line["part"] for line in exactness} >= {"gaussian", "duplicates", "patches 4 x 4", "trained embeddings"}
    for line in exactness:
        assert line["rows"] == line["proved"] + line["resolved"] + line["drained"] >= 24
        errors = ("wrong", "wrong_codes", "wrong_distances", "reference_wrong")
        assert [line[name] for name in errors] == [0, 0, 0, 0], line["part"]
    cases = read_lines(rehearsed / "sanitizers.jsonl")[0]
    assert (cases["tool"], cases["status"], cases["missing"]) == ("none", "clean", [])
    search = read_lines(rehearsed / "search.jsonl")
    assert {line["op"] for line in search} == {"rate", "nearest_code", "memory", "replay", "vector_quantize"}
    ours = [line for line in search if line["op"] == "nearest_code" and line["contender"] == "triton"]
    assert ours
    assert all((line["status"], line["wrong_percent"]) == ("ok", 0) for line in ours)
    tiles = read_lines(rehearsed / "tiles.jsonl")
    assert {line["op"] for line in tiles} == {"profile", "counters", "tile", "choice"}
    assert all(line["status"] == "ok" for line in tiles if line["op"] == "tile")
    assert {line["op"] for line in read_lines(rehearsed / "training.jsonl")} == {"run", "step", "loop"}
    assert [line["method"] for line in read_lines(rehearsed / "rate_distortion.jsonl")] == ["kmeans", "model"]


@pytest.mark.timeout(900)
def test_what_is_finished_is_not_done_again(rehearsed: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in rehearsed.iterdir()}
    finished = rehearse(rehearsed, tmp_path, "--stages", "tests", "exactness", "search", "tiles", "training", "sweep")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("finished before") == 6
    assert {file.name: file.read_bytes() for file in rehearsed.iterdir()} == before


def in_results(outcome: str, stage: str = "tests") -> dict[str, Any]:
    return {"stage": stage, "outcome": outcome, **make_header((), "abc", rehearse=True)}


def test_a_stage_in_a_process_of_its_own_that_dies_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = gpu_pass.parse(["--rehearse", "--out", str(tmp_path), "--work", str(tmp_path / "w")])
    monkeypatch.setattr(gpu_pass.sys, "executable", str(dying_python(tmp_path)))
    outcomes = gpu_pass.run(options, [STAGES[0]])
    assert outcomes == {"tests": "failed: its process ended with exit code 7"}
    assert read_lines(tmp_path / "stages.jsonl")[-1]["outcome"] == outcomes["tests"]


def dying_python(folder: Path) -> Path:
    """A program that ends with exit code 7 whatever it is given."""
    file = folder / "dying"
    file.write_text("#!/bin/sh\nexit 7\n")
    file.chmod(0o755)
    return file


def test_a_stage_that_does_not_stop_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "hanging"
    file.write_text("#!/bin/sh\nsleep 600\n")
    file.chmod(0o755)
    monkeypatch.setattr(gpu_pass.sys, "executable", str(file))
    monkeypatch.setattr(gpu_pass, "_GRACE_S", 0.0)
    monkeypatch.setattr(gpu_pass, "_LEAST_S", 0.1)
    options = gpu_pass.parse(["--rehearse", "--out", str(tmp_path), "--minutes", "0.1"])
    outcomes = gpu_pass.run(options, list(STAGES[:2]))
    assert outcomes["tests"].startswith("failed: it had to be ended")
    assert outcomes["exactness"] == "not begun: no time left"
    assert [line["stage"] for line in read_lines(tmp_path / "stages.jsonl")] == ["tests"]


def test_an_error_of_a_stage_is_its_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        @staticmethod
        def run(context: Context) -> str:
            raise RuntimeError(f"broke on {context.device}")

    monkeypatch.setattr(gpu_pass.importlib, "import_module", lambda name: Broken)
    options = gpu_pass.parse(["--rehearse", "--here", "--out", str(tmp_path), "--work", str(tmp_path / "work")])
    outcome = gpu_pass.run(options, [STAGES[0]])["tests"]
    assert outcome.startswith("failed: Traceback")
    assert outcome.rstrip().endswith("RuntimeError: broke on cpu")
    assert "broke on cpu" in capsys.readouterr().err
    assert not gpu_pass.is_settled(outcome)


def test_wheels_are_found_after_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "before")
    wheels, folder = tmp_path / "wheels", tmp_path / "packages"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "tiny_package-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny_package/__init__.py", "ANSWER = 42\n")
    gpu_pass.unpack(wheels, folder)
    assert sys.path[-1] == str(folder)
    assert os.environ["PYTHONPATH"] == f"before{os.pathsep}{folder}"
    assert (folder / "tiny_package" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "tset"], "--stages must be of tests, .*, got 'tset'"),
        (["--minutes", "0"], "--minutes must be above 0, got 0.0"),
        (["--data-dir", "nowhere"], "--data-dir must be a folder, got nowhere"),
        (["--wheels", "nowhere"], "--wheels must be a folder, got nowhere"),
        (["--checkpoint", "nowhere.pt"], "--checkpoint must be a file, got nowhere.pt"),
    ],
)
def test_bad_options_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        gpu_pass.check(gpu_pass.parse(["--rehearse", "--out", str(tmp_path), *arguments]))


def test_a_rehearsal_never_mixes_with_measurements(tmp_path: Path) -> None:
    (tmp_path / "stages.jsonl").write_text(json.dumps({**in_results(FINISHED), "rehearsal": False}) + "\n")
    with pytest.raises(ValueError, match="--out must hold a rehearsal or measurements, not both"):
        gpu_pass.check(gpu_pass.parse(["--rehearse", "--out", str(tmp_path)]))


def test_without_a_gpu_only_a_rehearsal_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_pass.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_pass.py", "--out", str(tmp_path)])
    assert gpu_pass.main() == 2
    assert "PyTorch sees no GPU; --rehearse runs everything" in capsys.readouterr().err


def test_results_of_other_sources_are_done_again(tmp_path: Path) -> None:
    header = make_header(("vq_kernels/search",), "abc", rehearse=True)
    Results(tmp_path / "stages.jsonl", header).add(stage="tests", outcome=FINISHED)
    assert Results(tmp_path / "stages.jsonl", header).has(stage="tests", outcome=FINISHED)
    assert not Results(tmp_path / "stages.jsonl", {**header, "sources": "0"}).has(stage="tests")
    assert not Results(tmp_path / "stages.jsonl", {**header, "gpu": "NVIDIA H200"}).has(stage="tests")
