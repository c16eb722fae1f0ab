"""Training runs for benchmarks: they resume where they stopped, and are measured."""

import json
import time
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vqae import VQAE, train
from vqae.config import Config
from vqae.runtime import process
from vqae.training.checkpoint import RunFolder, atomic_write
from vqae.training.metrics import Evaluation, evaluate

Dataset = Literal["cifar10", "imagefolder", "synthetic"]

_NOT_COMPARED = ("out", "data_dir", "test_fraction", "skip_unreadable", "device", "checkpoint_minutes", "seed")


def run_training(config: Config, signals: process.SignalHandler) -> None:
    """Runs `vqae.train` with these settings, or resumes the run in config.out. Raises what `vqae.train.main` does."""
    settings = config.out.with_name(config.out.name + ".settings.json")
    atomic_write(settings, json.dumps(config.to_dict()).encode())
    process.PROCESS_START = time.monotonic()  # --max-minutes counts from here
    train.main(["--config", str(settings), "--resume"], signals)


def measure_run(folder: Path, images: dict[str, Tensor], device: torch.device) -> dict[str, Evaluation]:
    """Evaluates a run's best.pt on several sets of images, each [N, 3, H, W] uint8, by name."""
    model = VQAE.load(RunFolder(folder).best, device)
    return {name: evaluate(model, part, 256, device) for name, part in images.items()}


def run_minutes(folder: Path) -> float:
    """Minutes that a finished run took, from start to last evaluation, in all its processes together."""
    last = RunFolder(folder).metrics.read_text().splitlines()[-1]
    return float(json.loads(last)["elapsed_s"]) / 60


def compared_settings(config: Config) -> dict[str, Any]:
    """The settings that two runs must share to differ in their seed only, as plain values."""
    return {name: value for name, value in config.to_dict().items() if name not in _NOT_COMPARED}


def find_dataset(dataset: Dataset | None, data_dir: Path | None) -> Dataset:
    """The named data set; by default imagefolder if data_dir/train is a folder, else cifar10."""
    if dataset is not None:
        return dataset
    return "imagefolder" if data_dir is not None and (data_dir / "train").is_dir() else "cifar10"
