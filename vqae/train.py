"""Train the autoencoder: `python -m vqae.train --help`."""

from __future__ import annotations

if __name__ == "__main__":
    from vqae.runtime.process import run_command

    run_command("vqae.train")  # imports this module again, after the signal handlers are installed

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro

from vqae.config import RECIPES, Config, Dataset, flag, with_current_flags
from vqae.data.image_folder import check_outside, read_folders
from vqae.data.load import Images, fingerprints, load_images, split_train
from vqae.model.pca_init import init_by_pca
from vqae.model.vqae import VQAE, build_model
from vqae.runtime import distributed as dist
from vqae.runtime.distributed import world_size
from vqae.runtime.errors import LostProcessError, UsageError
from vqae.runtime.process import Launch, SignalHandler, program
from vqae.training.checkpoint import RunFolder, load_checkpoint
from vqae.training.trainer import Trainer

_MAY_CHANGE = ("out", "data_dir", "device", "dataset", "checkpoint_minutes", "cuda_graph")  # when a run is resumed
_EXTENDS = ("epochs", "max_minutes")  # may also change when a finished run is resumed


@dataclass(frozen=True)
class Command:
    """Train the vector-quantized autoencoder."""

    run: tyro.conf.OmitArgPrefixes[Config]
    config: Path | None = None
    """JSON file of default settings, for example the config.json of a run. Command-line flags override them."""
    recipe: Literal["plain"] | None = None
    """plain: SGD with one learning rate, without warm-up and flips. Overrides --config, but not command-line flags.
    Because of its random initialisation, single learning rate and lack of dead-code resets, the codebook collapses."""
    resume: bool = False
    """Resume the run in --out. Starts a new run if there is none. With another value of --epochs or --max-minutes, a
    finished run goes on: the learning-rate schedule is that of the longer run, so the rates rise again."""
    overwrite: bool = False
    """Replace the run in --out."""


def parse(arguments: list[str]) -> Command:
    """Parse the command line. Defaults come from --recipe, then from --config or, with --resume, from the run's own."""
    arguments = with_current_flags(arguments)
    command = _parse(arguments, Config())
    folder = RunFolder(command.run.out)
    own_config = command.resume and command.config is None and folder.config.exists()
    source = folder.config if own_config else command.config
    defaults = Config() if source is None else Config.read(source)
    if command.recipe is not None:
        defaults = dataclasses.replace(defaults, **RECIPES[command.recipe])
    if defaults != Config():
        command = _parse(arguments, defaults)
    if own_config:  # the folder may have been renamed since
        command = dataclasses.replace(command, run=dataclasses.replace(command.run, out=folder.path))
    if command.resume and command.overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    command.run.check()
    return command


def _parse(arguments: list[str], defaults: Config) -> Command:
    return tyro.cli(Command, args=arguments, default=Command(run=defaults), prog=program("train"))


def main(arguments: list[str], signals: SignalHandler) -> None:
    """Run the command line. Raises the exceptions that `run_command` turns into exit codes."""
    command, launch = parse(arguments), Launch.from_environment()
    if command.run.batch_size < launch.world_size:
        raise UsageError(
            f"--batch-size must be at least {launch.world_size}, one image per process, got {command.run.batch_size}"
        )
    try:
        with dist.process_group(command.run.device) as device:
            _train(dist.broadcast_from_rank0(lambda: command), device, signals)
    except LostProcessError as error:
        raise LostProcessError(f"{error}; {launch.resume_advice(command.run.out)}") from error


def _train(command: Command, device: torch.device, signals: SignalHandler) -> None:
    """Load the images and train, in a single process or as one of the process group."""
    config, folder = command.run, RunFolder(command.run.out)
    dist.broadcast_from_rank0(lambda: _check_outside_images(config, folder))
    (restarts,) = dist.max_over_ranks(Launch.from_environment().restarts)  # each machine counts only its own
    state = dist.broadcast_from_rank0(lambda: _checkpoint_to_resume(folder, command, restarted=restarts > 0))
    if state and state["finished"] and all(state["config"][name] == getattr(config, name) for name in _EXTENDS):
        _print(f"the run in {folder.path} is finished: nothing to do")
        return

    images = _load_images(config, config.dataset if state is None else state["dataset"])
    config = dataclasses.replace(config, dataset=cast(Dataset, images.dataset))
    train, val = split_train(images.train, config.limit, config.val_fraction, config.seed)
    if train.shape[0] < world_size():
        raise UsageError(f"{world_size()} processes need one training image each, got {train.shape[0]}")
    image_size = (train.shape[2], train.shape[3])

    torch.manual_seed(config.seed)
    model = build_model(config.fitted_to(train.shape[0]), image_size)
    _set_pixel_statistics(model, train)
    dist.broadcast_from_rank0(lambda: folder.begin(config) if state is None else folder.write_config(config))
    where = str(device) if world_size() == 1 else f"{world_size()} processes, this one on {device}"
    sizes = f"{train.shape[0]} training, {val.shape[0]} validation, {images.test.shape[0]} test"
    _print(f"{images.dataset}: {sizes} images of {image_size[0]} x {image_size[1]}, on {where}")
    if state is None:
        if config.network_init == "pca":
            _print("initialising encoder and decoder by PCA ...")
            init_by_pca(model, train)
        model.load_state_dict(dist.broadcast_from_rank0(model.state_dict))  # other machines may round differently
    Trainer(config, model.to(device), train, val, images.test, images.dataset, device, signals, state).run()
    names = dict.fromkeys(file.relative_to(folder.path).parts[0] for file in folder.files())
    _print(f"results in {folder.path}: {', '.join(names)}")


def _print(text: str) -> None:
    if dist.is_rank0():
        print(text, flush=True)


def _load_images(config: Config, dataset: Dataset) -> Images:
    """Load the images on all ranks, and check that they are the same."""
    downloads = dataset in ("auto", "cifar10")
    load = dist.local_rank0_first if downloads else dist.on_all_ranks
    images = load(lambda: load_images(dataset, config.data_dir, **config.folder_options))
    dist.check_same("the images", (images.dataset, *fingerprints(images.train, images.test)))
    return images


def _check_outside_images(config: Config, folder: RunFolder) -> None:
    """Raise UsageError if the next run would read the files of this one as images."""
    if config.dataset == "imagefolder" and config.data_dir is not None:
        for path in (folder.path, folder.events):
            check_outside(path, read_folders(config.data_dir))


def _checkpoint_to_resume(folder: RunFolder, command: Command, *, restarted: bool) -> dict[str, Any] | None:
    """The checkpoint to resume from, or None for a new run. Raises UsageError if the folder must not be written to.

    A job that torchrun restarted resumes its own run without --resume, but no other run.
    """
    resume = command.resume or restarted
    if not resume or not folder.last.exists():
        # A run that was interrupted before its first checkpoint has written config.json alone.
        folder.check(may_replace=command.overwrite or (resume and folder.files() in ([], [folder.config])))
        if resume:
            own = command.resume and command.config is None and folder.config.exists()
            source = f"the settings of {folder.config}" if own else "the settings given here"
            print(f"no checkpoint in {folder.path}: starting a new run with {source}", file=sys.stderr)
        return None
    state = load_checkpoint(folder.last)
    if not command.resume and state.get("job") != Launch.from_environment().job:
        folder.check(may_replace=command.overwrite)
        return None
    _check_settings(state, folder.last, command.run)
    return state


def _check_settings(state: dict[str, Any], file: Path, config: Config) -> None:
    """Raise UsageError if the run of a checkpoint cannot be resumed with these settings."""
    if "optimizer" not in state:
        raise UsageError(f"{file} holds a model alone, like best.pt: it cannot be resumed")
    if "images" not in state:
        raise UsageError(f"{file} was written by an older version of this program, which alone can resume it")
    before, now = Config.from_dict(state["config"], str(file)).to_dict(), config.to_dict()
    may_change = (*_MAY_CHANGE, *_EXTENDS) if state["finished"] else _MAY_CHANGE
    changed = [name for name, value in now.items() if name not in may_change and before[name] != value]
    if config.dataset not in ("auto", state["dataset"]):
        changed.append("dataset")
    if changed:
        differences = ", ".join(f"{flag(name)} was {before[name]}, got {now[name]}" for name in changed)
        raise UsageError(f"--resume: the settings differ from those of {file}: {differences}")
    if config.epochs < state["epoch"]:
        raise UsageError(f"--epochs must be at least {state['epoch']}, which are finished, got {config.epochs}")


def _set_pixel_statistics(model: VQAE, images: torch.Tensor) -> None:
    """Set pixel_mean and pixel_std to those of images [N, 3, H, W] uint8: a mean per channel, one deviation for all."""
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
    frequencies = counts / counts.sum(dim=1, keepdim=True)  # [3, 256]
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = frequencies @ levels
    std = (frequencies @ levels.square() - mean.square()).mean().clamp(min=0).sqrt()
    model.pixel_mean.copy_(mean[:, None, None])
    model.pixel_std.copy_(std.clamp(min=1 / 255))
