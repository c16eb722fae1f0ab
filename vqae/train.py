"""Train the auto-encoder: `python -m vqae.train --help`."""

from __future__ import annotations

if __name__ == "__main__":
    from vqae.runtime.process import run_command

    run_command("vqae.train")  # loads this module again, once the signal handlers stand

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro

from vqae.config import RECIPES, Config, Dataset, flag
from vqae.data.load import Images, fingerprints, load_images, split_train
from vqae.model.pca_init import init_by_pca
from vqae.model.vqae import VQAE, build_model
from vqae.runtime.distributed import (
    any_rank,
    broadcast_from_rank0,
    check_same,
    is_rank0,
    local_rank0_first,
    process_group,
    world_size,
)
from vqae.runtime.errors import LostProcessError, UsageError
from vqae.runtime.process import Launch, SignalHandler
from vqae.training.checkpoint import RunFolder, load_checkpoint
from vqae.training.trainer import Trainer

_MAY_CHANGE = ("out", "data_dir", "device", "dataset", "checkpoint_minutes")  # between a run and its continuation


@dataclass(frozen=True)
class Command:
    """Train the vector-quantized auto-encoder."""

    run: tyro.conf.OmitArgPrefixes[Config]
    config: Path | None = None
    """Take the settings of this JSON file (a run's config.json, say) as defaults; flags go before them."""
    recipe: Literal["plain"] | None = None
    """plain: the specification as written, which collapses: all at random, codes N(0, 1), SGD at 0.1 for all, with
    momentum and weight decay for encoder and decoder, no warm-up, no restarts, no mirrored images. Sets these
    settings at once, over those of --config; flags go before them."""
    resume: bool = False
    """Go on with the run in --out, with its settings; begin it where there is none."""
    overwrite: bool = False
    """Replace the run in --out."""


def parse(arguments: list[str]) -> Command:
    """The command line as settings; what it leaves out comes from --recipe, then from --config, or, with --resume, from
    the run's own."""
    command = _parse(arguments, Config())
    folder = RunFolder(command.run.out)
    source = command.config
    if source is None and command.resume and folder.config.exists():
        source = folder.config
    defaults = Config() if source is None else Config.read(source)
    if command.recipe is not None:
        defaults = dataclasses.replace(defaults, **RECIPES[command.recipe])
    if defaults != Config():
        command = _parse(arguments, defaults)
    if source is not None and command.config is None:  # the folder may have been renamed since it was written
        command = dataclasses.replace(command, run=dataclasses.replace(command.run, out=folder.path))
    if command.resume and command.overwrite:
        raise UsageError("--resume and --overwrite contradict each other: give one")
    command.run.check()
    return command


def _parse(arguments: list[str], defaults: Config) -> Command:
    return tyro.cli(Command, args=arguments, default=Command(run=defaults), prog="python -m vqae.train")


def main(arguments: list[str], signals: SignalHandler) -> None:
    """Run the command line; raises what `run_command` turns into exit codes."""
    command = parse(arguments)
    num_processes = Launch.from_environment().world_size
    if command.run.batch_size < num_processes:
        raise UsageError(
            f"--batch-size must be at least {num_processes}, an image for each process, got {command.run.batch_size}"
        )
    try:
        with process_group(command.run.device) as device:
            _train(broadcast_from_rank0(lambda: command), device, signals)
    except LostProcessError as error:
        raise LostProcessError(f"{error}; {Launch.from_environment().how_to_go_on(command.run.out)}") from error


def _train(command: Command, device: torch.device, signals: SignalHandler) -> None:
    """Read the images, and train on them, alone or together with the other processes of the group."""
    config, folder = command.run, RunFolder(command.run.out)
    begun_anew = any_rank(Launch.from_environment().restarts > 0)  # each machine counts what died there alone
    state = broadcast_from_rank0(lambda: _claim(folder, command, begun_anew))
    if state is not None and state["finished"]:
        _say(f"{folder.path} holds a finished run: nothing to do")
        return

    images = _read_images(config, config.dataset if state is None else state["dataset"])
    config = dataclasses.replace(config, dataset=cast(Dataset, images.dataset))
    train, val = split_train(images.train, config.limit, config.val_fraction, config.seed)
    if train.shape[0] < world_size():
        raise UsageError(f"{world_size()} processes need an image each to train on, got {train.shape[0]}")
    image_size = (images.train.shape[2], images.train.shape[3])
    if state is not None and tuple(state["image_size"]) != image_size:
        raise UsageError(f"the images must be {tuple(state['image_size'])} as in the checkpoint, got {image_size}")

    torch.manual_seed(config.seed)
    batch_size = min(config.batch_size, train.shape[0])
    model = build_model(dataclasses.replace(config, batch_size=batch_size), image_size)
    _set_pixel_statistics(model, train)
    broadcast_from_rank0(lambda: folder.begin(config) if state is None else folder.write_config(config))
    where = str(device) if world_size() == 1 else f"{world_size()} processes, this one on {device}"
    _say(
        f"{images.dataset}: {train.shape[0]} images to train on, {val.shape[0]} to validate, "
        f"{images.test.shape[0]} to test, {image_size[0]} x {image_size[1]}, on {where}"
    )
    if state is None:
        if config.network_init == "pca":
            _say("encoder and decoder begin from the images ...")
            init_by_pca(model, train)
        model.load_state_dict(broadcast_from_rank0(model.state_dict))  # unlike machines do not round alike
    Trainer(config, model.to(device), train, val, images.test, images.dataset, device, signals, state).run()
    names = dict.fromkeys(file.relative_to(folder.path).parts[0] for file in folder.files())
    _say(f"results in {folder.path}: {', '.join(names)}")


def _say(text: str) -> None:
    """Print a line, once for all processes."""
    if is_rank0():
        print(text, flush=True)


def _read_images(config: Config, dataset: Dataset) -> Images:
    """The images, the same in all processes."""
    images = local_rank0_first(
        lambda: load_images(dataset, config.data_dir, image_size=config.image_size, seed=config.seed),
        may_download=dataset in ("auto", "cifar10"),
    )
    check_same("the images", (images.dataset, *fingerprints(images.train, images.test)))
    return images


def _claim(folder: RunFolder, command: Command, begun_anew: bool) -> dict[str, Any] | None:
    """Raise UsageError if the folder may not be written to; the checkpoint in it to go on from, if there is one.

    A job that torchrun began anew goes on by itself with its own run, and with no other.
    """
    goes_on = command.resume or begun_anew
    if not goes_on or not folder.last.exists():
        folder.check(may_be_taken=command.overwrite or (goes_on and not folder.holds_results()))
        if goes_on:
            own = command.resume and command.config is None and folder.config.exists()
            source = f"the settings of {folder.config}" if own else "the settings given here"
            print(f"no checkpoint in {folder.path}: the run starts anew, with {source}", file=sys.stderr)
        return None
    state = load_checkpoint(folder.last)
    if not command.resume and state.get("job") != Launch.from_environment().job:
        folder.check(may_be_taken=command.overwrite)
        return None
    _check_settings(state, folder, command.run)
    return state


def _check_settings(state: dict[str, Any], folder: RunFolder, config: Config) -> None:
    """Raise UsageError where a run cannot go on from a checkpoint with these settings."""
    if "optimizer" not in state:
        raise UsageError(f"{folder.last} holds a model alone, as best.pt does: there is nothing to go on from")
    if "images" not in state:
        raise UsageError(f"{folder.last} is of an earlier version of this program, which alone can go on with it")
    before, now = Config.from_dict(state["config"], str(folder.last)).to_dict(), config.to_dict()
    contradicting = [name for name, value in now.items() if name not in _MAY_CHANGE and before.get(name) != value]
    if config.dataset not in ("auto", state["dataset"]):
        contradicting.append("dataset")
    if contradicting:
        differences = ", ".join(f"{flag(name)} was {before.get(name)}, got {now[name]}" for name in contradicting)
        raise UsageError(f"--resume: the settings contradict those of {folder.last}: {differences}")


def _set_pixel_statistics(model: VQAE, images: torch.Tensor) -> None:
    """Mean of each channel, and one standard deviation around them, of images [N, 3, H, W] uint8, in [0, 1]."""
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
    levels = torch.arange(256, dtype=torch.float64) / 255
    shares = counts / counts.sum(dim=1, keepdim=True)  # [3, 256]
    mean = shares @ levels
    std = (shares @ levels.square() - mean.square()).mean().clamp(min=0).sqrt()
    model.pixel_mean.copy_(mean[:, None, None])
    model.pixel_std.copy_(std.clamp(min=1 / 255))
