"""Evaluate a checkpoint: `python -m vqae.evaluate --help`."""

from __future__ import annotations

if __name__ == "__main__":
    from vqae.runtime.process import run_command

    run_command("vqae.evaluate")  # imports this module again, after the signal handlers are installed

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from torch import Tensor

from vqae.config import Config
from vqae.data.load import fingerprints, load_split
from vqae.model.vqae import VQAE, model_from_checkpoint
from vqae.runtime.distributed import check_same, is_rank0, local_rank0_first, on_all_ranks, process_group
from vqae.runtime.errors import UsageError
from vqae.runtime.process import SignalHandler, program
from vqae.training.checkpoint import json_line, load_checkpoint
from vqae.training.metrics import evaluate

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """Print one JSON line with mse, psnr_db, perplexity, codes_used, images, dataset and split. Under torchrun, the
    processes share the images."""

    checkpoint: Path
    """best.pt or last.pt of a run."""
    dataset: Literal["cifar10", "imagefolder", "synthetic"] | None = None
    """Data set to evaluate on. None is the data set of the run."""
    data_dir: Path | None = None
    """Folder of the images. None is the folder of the run. One without train/ and test/ is split as the run splits."""
    skip_unreadable: bool = False
    """Skip and count files that are damaged or not images, as the run does if it was given this option."""
    split: Literal["train", "test"] = "test"
    """Split to evaluate on."""
    batch_size: int = 256
    """Images per batch."""
    device: str = "auto"
    """auto, cpu, cuda, or a GPU such as cuda:1."""


def main(arguments: list[str], signals: SignalHandler) -> None:
    """Run the command line. Raises the exceptions that `run_command` turns into exit codes."""
    command = tyro.cli(Command, args=arguments, prog=program("evaluate"))
    if command.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {command.batch_size}")
    with process_group(command.device) as device:
        model, images, dataset = _load(command)
        result = evaluate(model.to(device), images, command.batch_size, device, signals.poll)._asdict()
        del result["counts"]
        if is_rank0():
            print(json_line({**result, "dataset": dataset, "split": command.split}))


def _load(command: Command) -> tuple[VQAE, Tensor, str]:
    """The model in eval mode, the images [N, 3, H, W] uint8, and the name of their data set."""
    state = on_all_ranks(lambda: load_checkpoint(command.checkpoint))
    model = on_all_ranks(lambda: model_from_checkpoint(state)).eval()
    check_same("the checkpoint", hashlib.sha256(command.checkpoint.read_bytes()).hexdigest()[:16])
    config = Config.from_dict(state["config"], "the checkpoint")
    dataset, data_dir = command.dataset or state["dataset"], command.data_dir
    if data_dir is None and dataset == state["dataset"]:
        data_dir = config.data_dir
    load = local_rank0_first if dataset == "cifar10" else on_all_ranks  # CIFAR-10 may have to be downloaded
    options = {**config.folder_options, "skip_unreadable": command.skip_unreadable or config.skip_unreadable}
    images, name = load(lambda: load_split(dataset, data_dir, command.split, **options))
    check_same("the images", fingerprints(images))
    if command.split == "test" and data_dir == config.data_dir and "images" in state:
        *_, before = state["images"]
        if [tuple(before)] != fingerprints(images):
            _logger.warning("the test images are not those of the run, which may have trained on some of these")
    if tuple(images.shape[2:]) != model.image_size:
        raise UsageError(f"images must be {model.image_size} as in the checkpoint, got {tuple(images.shape[2:])}")
    return model, images, name
