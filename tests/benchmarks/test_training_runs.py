"""Training runs of benchmarks: what they leave, how they end, and that an interruption loses nothing."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.training_runs import compared_settings, find_dataset, measure_run, run_minutes, run_training
from vqae.config import Config
from vqae.data.load import load_images
from vqae.runtime import process
from vqae.runtime.errors import DivergedError, UsageError
from vqae.runtime.process import SignalHandler
from vqae.training.checkpoint import RunFolder

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def config(image_folder: Path, tmp_path: Path) -> Config:
    return Config(
        lr=0.3,
        out=tmp_path / "runs" / "one",
        dataset="imagefolder",
        data_dir=image_folder,
        num_codes=4,
        code_dim=8,
        hidden_dims=(8,),
        batch_size=8,
        epochs=1,
        val_fraction=0.25,
        device="cpu",
    )


def test_a_run_is_made_once_and_measured(config: Config, image_folder: Path) -> None:
    run_training(config, SignalHandler())
    folder = RunFolder(config.out)
    assert Config.read(folder.config) == config
    before = folder.last.stat().st_mtime_ns
    run_training(config, SignalHandler())  # finished: nothing to do
    assert folder.last.stat().st_mtime_ns == before

    test = load_images("imagefolder", image_folder).test
    measured = measure_run(config.out, {"test": test, "first": test[:3]}, torch.device("cpu"))
    line = json.loads(folder.metrics.read_text().splitlines()[-1])
    assert measured["test"].mse == pytest.approx(line["test_mse"])
    assert (measured["test"].codes_used, measured["test"].images) == (line["codes_used"], 16)
    assert measured["first"].images == 3
    assert run_minutes(config.out) == line["elapsed_s"] / 60
    with pytest.raises(UsageError, match=r"--resume: the settings differ from those .* --lr was 0.3, got 0.5"):
        run_training(dataclasses.replace(config, lr=0.5), SignalHandler())


def test_the_time_limit_counts_from_the_start_of_the_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "PROCESS_START", time.monotonic() - 3600)
    run_training(dataclasses.replace(config, max_minutes=30.0), SignalHandler())
    assert run_minutes(config.out) < 30


def test_a_run_that_diverges(config: Config) -> None:
    wild = dataclasses.replace(config, lr=1e30, warmup=0.0, embedding_norm="none")
    with pytest.raises(DivergedError, match="a loss was not finite at step 2"):
        run_training(wild, SignalHandler())


def test_an_interruption_ends_the_run_saved(config: Config, image_folder: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "benchmarks/rate_distortion.py", "--data-dir", str(image_folder), "--num-codes", "4"),
        *("--seeds", "0", "--methods", "model", "--out", str(tmp_path), "--epochs", "1000000", "--batch-size", "8"),
        *("--code-dim", "8", "--hidden-dims", "8", "--device", "cpu", "--checkpoint-minutes", "1000"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    folder = RunFolder(tmp_path / "runs" / "codes-4-seed-0")
    deadline = time.monotonic() + 100
    while not folder.metrics.exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 143, err
    assert "saved at step" in err
    assert "Traceback" not in err
    assert not torch.load(folder.last, weights_only=True)["finished"]
    assert not (tmp_path / "results.jsonl").exists()


def test_settings_that_two_seeds_of_a_run_share(config: Config) -> None:
    elsewhere = dataclasses.replace(config, out=Path("there"), data_dir=None, device="cuda", seed=3)
    assert compared_settings(elsewhere) == compared_settings(config)
    for overrides in ({"lr": 0.5}, {"flip": False}, {"dataset": "cifar10"}, {"hidden_dims": (8, 8)}):
        assert compared_settings(dataclasses.replace(config, **overrides)) != compared_settings(config)
    assert json.loads(json.dumps(compared_settings(config))) == compared_settings(config)


def test_the_default_data_set(image_folder: Path, tmp_path: Path) -> None:
    assert find_dataset(None, image_folder) == "imagefolder"
    assert find_dataset(None, tmp_path) == find_dataset(None, None) == "cifar10"
    assert find_dataset("synthetic", image_folder) == "synthetic"
