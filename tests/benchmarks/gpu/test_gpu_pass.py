"""The GPU pass: rehearsed as a whole, gone on with where it stopped, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import gpu_pass
import pytest
from gpu import provisions
from gpu.results import ROOT, Results, make_header, read_lines
from gpu.stage import FINISHED, STAGES, Context

from vqae.config import Config
from vqae.model.vqae import build_model
from vqae.training.checkpoint import save_checkpoint

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
    model = build_model(Config(num_codes=8, code_dim=8, hidden_dims=(8,)), (12, 12))
    state = {"config": Config(num_codes=8, code_dim=8, hidden_dims=(8,)).to_dict(), "dataset": "imagefolder"}
    save_checkpoint(work / "model.pt", {**state, "image_size": [12, 12], "model": model.state_dict()})
    checkpoint = ("--checkpoint", str(work / "model.pt"))  # spares a run
    finished = rehearse(out, work, "--here", "--commit", "abc", "--minutes", "30", *checkpoint)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return out


@pytest.mark.timeout(900)
def test_a_rehearsal_goes_through_every_stage(rehearsed: Path) -> None:
    outcomes = {
        line["stage"]: line["outcome"] for line in read_lines(rehearsed / "checks.jsonl") if line["op"] == "stage"
    }
    assert list(outcomes) == [stage.name for stage in STAGES]
    assert all(gpu_pass.is_settled(outcome) for outcome in outcomes.values()), outcomes
    files = sorted(rehearsed.iterdir())
    assert len(files) == 6
    for file in files:
        for line in read_lines(file):
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
    checks = read_lines(rehearsed / "checks.jsonl")
    tests = next(line for line in checks if line["op"] == "tests")
    assert (tests["status"], tests["failed"]) == ("passed", 0)
    assert set(tests["skipped"]) >= {"no CUDA device"}
    cases = next(line for line in checks if line["op"] == "sanitizer")
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
    return {"op": "stage", "stage": stage, "outcome": outcome, **make_header((), "abc", rehearse=True)}


def test_a_stage_in_a_process_of_its_own_that_dies_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = gpu_pass.parse(["--rehearse", "--out", str(tmp_path), "--work", str(tmp_path / "w")])
    monkeypatch.setattr(gpu_pass.sys, "executable", str(dying_python(tmp_path)))
    outcomes = gpu_pass.run(options, [STAGES[0]])
    assert outcomes == {"tests": "failed: its process ended with exit code 7"}
    assert read_lines(tmp_path / "checks.jsonl")[-1]["outcome"] == outcomes["tests"]


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
    options = gpu_pass.parse(["--rehearse", "--out", str(tmp_path), "--minutes", "0.02"])
    outcomes = gpu_pass.run(options, list(STAGES[:2]))
    assert outcomes["tests"].startswith("failed: it had to be ended")
    assert outcomes["exactness"] == "not begun: no time left"
    assert [line["stage"] for line in read_lines(tmp_path / "checks.jsonl")] == ["tests"]


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "tset"], "--stages must be of tests, .*, got 'tset'"),
        (["--minutes", "0"], "--minutes must be above 0, got 0.0"),
        (["--data-dir", "nowhere"], "--data-dir must be a folder or an archive, got nowhere"),
        (["--wheels", "nowhere"], "--wheels must be a folder, got nowhere"),
        (["--checkpoint", "nowhere.pt"], "--checkpoint must be a file, got nowhere.pt"),
    ],
)
def test_bad_options_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        gpu_pass.check(gpu_pass.parse(["--rehearse", "--out", str(tmp_path), *arguments]))


def test_a_rehearsal_never_mixes_with_measurements(tmp_path: Path) -> None:
    (tmp_path / "checks.jsonl").write_text(json.dumps({**in_results(FINISHED), "rehearsal": False}) + "\n")
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
    Results(tmp_path / "checks.jsonl", header).add(stage="tests", outcome=FINISHED)
    assert Results(tmp_path / "checks.jsonl", header).has(stage="tests", outcome=FINISHED)
    assert not Results(tmp_path / "checks.jsonl", {**header, "sources": "0"}).has(stage="tests")
    another = {**header, "gpu": "NVIDIA H200"}
    assert not Results(tmp_path / "checks.jsonl", another).has(stage="tests")
    assert Results(tmp_path / "checks.jsonl", another, on_any_gpu=True).has(stage="tests")


STAGE = f"""#!{sys.executable}
import os, sys
sys.path[:0] = [{str(ROOT / "benchmarks")!r}, {str(ROOT)!r}]
from child_processes import exit_on_sigterm
from gpu.commands import run_command
exit_on_sigterm()
run_command(["sh", "-c", f"echo {{os.getpid()}} $$ > $PIDS.part; mv $PIDS.part $PIDS; exec sleep 600"], seconds=600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_runs_on_when_the_pass_is_ended(tmp_path: Path, number: signal.Signals) -> None:
    """A pass, its stage, and a command of the stage, each in a session of its own."""
    stage, file = tmp_path / "stage", tmp_path / "pids"
    stage.write_text(STAGE)
    stage.chmod(0o755)
    program = f"import sys, gpu_pass; sys.executable = {str(stage)!r}; gpu_pass.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--rehearse", "--out", str(tmp_path), "--work", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT}", "PIDS": str(file)},
    )
    deadline = time.monotonic() + 60
    while not file.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pids = [int(pid) for pid in file.read_text().split()]
    assert [is_running(pid) for pid in pids] == [True, True]
    process.send_signal(number)
    process.wait(timeout=30)
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [is_running(pid) for pid in pids] == [False, False]


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


# -- what the machine may lack


def wheel(folder: Path, name: str, version: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", "ANSWER = 42\n")


def test_only_wheels_that_are_missing_or_newer_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "before")
    folder = tmp_path / "packages"
    wheel(tmp_path, "tiny_package", "1.0")
    wheel(tmp_path, "pytest", "0.1")
    wheel(tmp_path, "tyro", "999.0.0")
    taken = ["tiny_package-1.0-py3-none-any.whl", "tyro-999.0.0-py3-none-any.whl"]
    assert provisions.unpack_wheels(tmp_path, folder) == taken
    assert sys.path[0] == str(folder)
    assert os.environ["PYTHONPATH"] == f"{folder}{os.pathsep}before"
    assert sorted(file.name for file in folder.iterdir()) == ["tiny_package", "tyro"]


def test_what_is_missing_is_said_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert provisions.missing_modules(["pytest", "tyro"]) == []
    assert provisions.missing_modules(["pytest", "no_such_module"]) == ["no_such_module is not installed"]
    monkeypatch.setitem(sys.modules, "tyro", None)
    found = provisions.missing_modules(["tyro"])
    assert len(found) == 1
    assert found[0].startswith("tyro ")
    monkeypatch.setattr(gpu_pass, "missing_modules", lambda names: ["tyro is not installed"] * ("tyro" in names))
    options = gpu_pass.parse(["--rehearse", "--out", str(tmp_path)])
    able = "--stages be of tests exactness sanitizers"
    with pytest.raises(ValueError, match=rf"--wheels must hold what is missing \(tyro is not installed\), or {able}$"):
        gpu_pass.provide(options, list(STAGES))
    gpu_pass.provide(options, list(STAGES[:3]))


def test_pictures_may_be_an_archive(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "pictures" / "train" / "cat" / "1.png").write_bytes(b"picture")
    archive = tmp_path / "pictures.tar.xz"
    with tarfile.open(archive, "w:xz") as opened:
        opened.add(tmp_path / "pictures", "cifar10")
    options = gpu_pass.parse(["--rehearse", "--out", "o", "--work", str(tmp_path / "w"), "--data-dir", str(archive)])
    options.work.mkdir()
    gpu_pass.provide(options, [])
    assert options.data_dir == tmp_path / "w" / "pictures" / "cifar10"
    assert (options.data_dir / "train" / "cat" / "1.png").read_bytes() == b"picture"
    with tarfile.open(archive, "w:xz") as opened:
        opened.add(tmp_path / "pictures" / "train" / "cat", "cat")
    assert provisions.unpack_pictures(archive, tmp_path / "w" / "pictures") == options.data_dir  # unpacked once
    with pytest.raises(ValueError, match=r"--data-dir must hold train/<class>/\* and test/<class>/\*, got .*xz"):
        provisions.unpack_pictures(archive, tmp_path / "w" / "others")
