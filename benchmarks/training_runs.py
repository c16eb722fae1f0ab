"""Training runs for benchmarks. Each runs in its own process, resumes where it stopped, and is measured."""

import ctypes
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vqae import VQAE
from vqae.config import Config
from vqae.runtime.errors import DivergedError, UsageError
from vqae.training.checkpoint import RunFolder, atomic_write
from vqae.training.metrics import Evaluation, evaluate

Dataset = Literal["cifar10", "imagefolder", "synthetic"]

_NOT_COMPARED = ("out", "data_dir", "device", "checkpoint_minutes", "seed")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _stop_with_parent() -> None:
    """Sends this process SIGTERM when its parent dies, on which a training run saves itself. Linux only."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def run_training(config: Config) -> None:
    """Runs `python -m vqae.train` with these settings, or resumes the run in config.out.

    It uses a process because --max-minutes counts from the start of the process. If this process is interrupted or
    killed, the run saves itself and ends.

    Raises:
        DivergedError: the run diverged.
        UsageError: the run failed in another way.
    """
    settings = config.out.with_name(config.out.name + ".settings.json")
    atomic_write(settings, json.dumps(config.to_dict()).encode())
    command = [sys.executable, "-m", "vqae.train", "--config", str(settings), "--resume"]
    # A session of its own keeps the terminal's Ctrl-C away: together with our SIGTERM it would end the run unsaved.
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=_stop_with_parent
    ) as process:
        try:
            error = _forward_errors(process)
            exit_code = process.wait()
        except BaseException:
            process.terminate()
            _forward_errors(process)  # including where the run stopped
            raise
    if exit_code == 1 and error:
        raise DivergedError(f"{config.out}: {error}")
    if exit_code:
        raise UsageError(f"{config.out}: {error or f'the training ended with exit code {exit_code}'}")


def _forward_errors(process: "subprocess.Popen[str]") -> str:
    """Forwards the process's standard error until it ends, and returns the error that ended it, if any."""
    error = ""
    for line in process.stderr or ():
        print(line, end="", file=sys.stderr, flush=True)
        if line.startswith("error: "):
            error = line.removeprefix("error: ").strip()
    return error


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
