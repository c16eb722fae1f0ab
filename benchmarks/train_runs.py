"""Training runs of a benchmark: each in a process of its own, gone on with where it stopped, and measured."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from child_processes import stopped_with_parent
from torch import Tensor

from vqae import VQAE
from vqae.config import Config
from vqae.runtime.errors import DivergedError, UsageError
from vqae.training.checkpoint import RunFolder, atomic_write
from vqae.training.metrics import Evaluation, evaluate

Dataset = Literal["cifar10", "imagefolder", "synthetic"]

_NOT_COMPARED = ("out", "data_dir", "device", "checkpoint_minutes", "seed")  # where a run is made, and which of several


def run_training(config: Config) -> None:
    """`python -m vqae.train` with these settings, begun, or gone on with where config.out holds a part of the run.

    It is a process of its own, since --max-minutes counts from a process's start. When this process is interrupted, the
    run saves itself and ends first; when it is killed, the run saves itself too.

    Raises:
        DivergedError: it ended with that.
        UsageError: it ended with that, or in a way that it has no message for.
    """
    settings = config.out.with_name(config.out.name + ".settings.json")
    atomic_write(settings, json.dumps(config.to_dict()).encode())
    command = [sys.executable, "-m", "vqae.train", "--config", str(settings), "--resume"]
    # In a session of its own a terminal's Ctrl-C does not reach it: a second signal would end it unsaved.
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=stopped_with_parent
    ) as process:
        try:
            error = _forward_errors(process)
            exit_code = process.wait()
        except BaseException:
            process.terminate()
            _forward_errors(process)  # it says where it stopped
            raise
    if exit_code == 1 and error:
        raise DivergedError(f"{config.out}: {error}")
    if exit_code:
        raise UsageError(f"{config.out}: {error or f'the training ended with exit code {exit_code}'}")


def _forward_errors(process: "subprocess.Popen[str]") -> str:
    """Pass on what the process writes to stderr until it ends; the error that it ended with, if any."""
    error = ""
    for line in process.stderr or ():
        print(line, end="", file=sys.stderr, flush=True)
        if line.startswith("error: "):
            error = line.removeprefix("error: ").strip()
    return error


def measure_run(folder: Path, pictures: dict[str, Tensor], device: torch.device) -> dict[str, Evaluation]:
    """What the model of a run's best.pt makes of several sets of pictures, each [N, 3, H, W] uint8, by their names."""
    model = VQAE.load(RunFolder(folder).best, device)
    return {name: evaluate(model, part, 256, device) for name, part in pictures.items()}


def run_minutes(folder: Path) -> float:
    """How long a finished run took, start to last evaluation, over all processes that it took."""
    last = RunFolder(folder).metrics.read_text().splitlines()[-1]
    return float(json.loads(last)["elapsed_s"]) / 60


def compared_settings(config: Config) -> dict[str, Any]:
    """The settings that two runs must share to be the same but for their seed, as plain values."""
    return {name: value for name, value in config.to_dict().items() if name not in _NOT_COMPARED}


def find_dataset(dataset: Dataset | None, data_dir: Path | None) -> Dataset:
    """The kind of pictures that is meant: as named, else by what is there; never synthetic ones unasked."""
    if dataset is not None:
        return dataset
    return "imagefolder" if data_dir is not None and (data_dir / "train").is_dir() else "cifar10"
