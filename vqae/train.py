"""Train the auto-encoder: `python -m vqae.train --help`."""

from __future__ import annotations

if __name__ == "__main__":
    from vqae.command_line import run_command

    run_command("vqae.train")  # loads this module again, once the signal handlers stand

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro

from vqae.batches import split_train
from vqae.checkpoint import build_model, load_checkpoint
from vqae.config import RECIPES, Config, Dataset, find_device, flag
from vqae.data import load_pictures
from vqae.errors import UsageError
from vqae.interrupt import SignalHandler
from vqae.model import VQAE
from vqae.run_folder import RunFolder
from vqae.trainer import Trainer

_MAY_CHANGE = ("out", "data_dir", "device", "dataset", "checkpoint_minutes")  # between a run and its continuation


@dataclass(frozen=True)
class Command:
    """Train the vector-quantized auto-encoder."""

    run: tyro.conf.OmitArgPrefixes[Config]
    config: Path | None = None
    """Take the settings of this JSON file (a run's config.json, say) as defaults; flags go before them."""
    recipe: Literal["plain"] | None = None
    """plain: the specification as written, which collapses: codes N(0, 1), learning rate 0.1 for all, no restarts, no
    normalisation of the embeddings. Sets these settings at once, over those of --config; flags go before them."""
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
    config, folder = command.run, RunFolder(command.run.out)
    device = find_device(config.device)
    folder.check(may_be_taken=command.resume or command.overwrite)
    state = _checkpoint_to_resume(config, folder) if command.resume else None
    if state is not None and state["finished"]:
        print(f"{folder.path} holds a finished run: nothing to do")
        return

    dataset = config.dataset if state is None else state["dataset"]
    pictures = load_pictures(dataset, config.data_dir, image_size=config.image_size, seed=config.seed)
    config = dataclasses.replace(config, dataset=cast(Dataset, pictures.dataset))
    split = split_train(pictures.train, config.limit, config.val_fraction, config.seed)
    image_size = (pictures.train.shape[2], pictures.train.shape[3])
    if state is not None and tuple(state["image_size"]) != image_size:
        raise UsageError(f"the pictures must be {tuple(state['image_size'])} as in the checkpoint, got {image_size}")

    torch.manual_seed(config.seed)
    model = build_model(config, image_size)
    _set_pixel_statistics(model, split.train)
    if state is None:
        folder.clear()
        folder.write_config(config)
    print(
        f"{pictures.dataset}: {split.train.shape[0]} pictures to train on, {split.val.shape[0]} to validate, "
        f"{pictures.test.shape[0]} to test, {image_size[0]} x {image_size[1]}, on {device}",
        flush=True,
    )
    Trainer(config, model.to(device), *split, pictures.test, pictures.dataset, device, signals, state).run()
    names = dict.fromkeys(file.relative_to(folder.path).parts[0] for file in folder.files())
    print(f"results in {folder.path}: {', '.join(names)}")


def _checkpoint_to_resume(config: Config, folder: RunFolder) -> dict[str, Any] | None:
    """The checkpoint in the folder; None, aloud, where there is none."""
    if not folder.last.exists():
        source = f"the settings of {folder.config}" if folder.config.exists() else "the settings given here"
        print(f"no checkpoint in {folder.path}: the run starts anew, with {source}", file=sys.stderr)
        return None
    state = load_checkpoint(folder.last)
    if "optimizer" not in state:
        raise UsageError(f"{folder.last} holds a model alone, as best.pt does: there is nothing to go on from")
    before, now = state["config"], config.to_dict()
    contradicting = [name for name, value in now.items() if name not in _MAY_CHANGE and before.get(name) != value]
    if config.dataset not in ("auto", state["dataset"]):
        contradicting.append("dataset")
    if contradicting:
        differences = ", ".join(f"{flag(name)} was {before.get(name)}, got {now[name]}" for name in contradicting)
        raise UsageError(f"--resume: the settings contradict those of {folder.last}: {differences}")
    return state


def _set_pixel_statistics(model: VQAE, pictures: torch.Tensor) -> None:
    """Mean of each channel, and one standard deviation around them, of pictures [N, 3, H, W] uint8, in [0, 1]."""
    mean = torch.stack([channel.double().mean() for channel in pictures.unbind(1)]) / 255
    sq_mean = torch.stack([channel.double().square().mean() for channel in pictures.unbind(1)]) / 255**2
    std = (sq_mean - mean.square()).mean().clamp(min=0).sqrt()
    model.pixel_mean.copy_(mean[:, None, None])
    model.pixel_std.copy_(std.clamp(min=1 / 255))
