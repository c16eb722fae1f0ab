"""How a process learns that it is one of several, what is refused then, and how a job resumes after a restart."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.vqae.commands import Outcome, load
from vqae.runtime.process import Launch

Command = Callable[..., Outcome]

# -- a job that torchrun began anew


@pytest.fixture
def restarted_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a job of one process that died."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "TORCHELASTIC_RESTART_COUNT": 1}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this job")


@pytest.mark.usefixtures("restarted_by_torchrun")
@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a_restarted_job_resumes_its_own_run(
    command: Command, tiny: tuple[str, ...], finished_run: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    out = shutil.copytree(finished_run, tmp_path / "run")
    torch.save({**load(out / "last.pt"), "job": "this job"}, out / "last.pt")
    outcome = command("vqae.train", *tiny, "--out", out, *flags)
    assert (outcome.exit_code, outcome.out) == (0, f"the run in {out} is finished: nothing to do\n")


@pytest.mark.usefixtures("restarted_by_torchrun")
def test_a_restarted_job_does_not_resume_the_run_it_overwrites(
    command: Command, tiny: tuple[str, ...], finished_run: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(finished_run, tmp_path / "run")
    outcome = command("vqae.train", *tiny, "--image-size", 8, "--epochs", 1, "--out", out, "--overwrite")
    assert outcome.exit_code == 0, outcome.err
    assert [line["epoch"] for line in load(out / "last.pt")["history"]] == [1]


@pytest.mark.usefixtures("restarted_by_torchrun")
@pytest.mark.parametrize("missing", ["last.pt", None])
def test_a_restarted_job_does_not_touch_the_run_of_another_job(
    command: Command, tiny: tuple[str, ...], finished_run: Path, tmp_path: Path, missing: str | None
) -> None:
    out = shutil.copytree(finished_run, tmp_path / "run")
    if missing:
        (out / missing).unlink()
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    outcome = command("vqae.train", *tiny, "--out", out)
    assert outcome.exit_code == 2
    assert "already holds a run" in outcome.err
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()} == before


def test_a_job_without_id_is_identified_by_its_log_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/logs/none_b/attempt_1/0/error.json")
    assert Launch.from_environment().job == "/logs/none_b"


@pytest.mark.usefixtures("restarted_by_torchrun")
def test_a_restart_without_a_checkpoint_starts_a_new_run(
    command: Command, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    outcome = command("vqae.train", *tiny, "--image-size", 8, "--epochs", 1, "--out", tmp_path / "run")
    assert outcome.exit_code == 0, outcome.err
    assert "starting a new run with the settings given here" in outcome.err


# -- refused before anything is computed


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"MASTER_ADDR": None}, (), "one of several processes, but MASTER_ADDR is not set: start them with torchrun"),
        ({"LOCAL_RANK": "two"}, (), "LOCAL_RANK must be a number, got 'two'"),
        ({"RANK": "2"}, (), "RANK must be below WORLD_SIZE"),
        ({"WORLD_SIZE": "32"}, (), "--batch-size must be at least 32, one image per process, got 16"),
        ({}, ("--device", "cuda:0"), "--device cuda:0 is one GPU for 2 processes: use --device cuda"),
        ({}, ("--device", "cuda"), "2 processes need a GPU each, but this machine has 1: use --nproc-per-node 1"),
        ({}, (), "2 processes need gloo, which this torch does not have"),
    ],
)
def test_inconsistent_jobs_are_refused(
    command: Command,
    tiny: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str | None],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    job = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"}
    for name, value in {**job, "MASTER_ADDR": "localhost", **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    outcome = command("vqae.train", *tiny, "--out", tmp_path / "run", *arguments)
    assert outcome.exit_code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_only_local_rank_0_prints_errors(
    command: Command, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    outcome = command("vqae.train", *tiny, "--out", tmp_path / "run", "--lr", "-1")
    assert (outcome.exit_code, outcome.err) == (2, "")


def test_a_job_of_one_process_is_a_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Launch.from_environment() == Launch()
