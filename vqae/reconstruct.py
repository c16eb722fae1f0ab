"""Show what a model makes of pictures: `python -m vqae.reconstruct --help`."""

from __future__ import annotations

if __name__ == "__main__":
    from vqae.runtime.process import run_command

    run_command("vqae.reconstruct")  # loads this module again, once the signal handlers stand

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from vqae.config import find_device
from vqae.data import read_picture
from vqae.runtime.errors import UsageError
from vqae.runtime.process import SignalHandler
from vqae.training.checkpoint import load_checkpoint, model_of
from vqae.training.report import plot_reconstructions


@dataclass(frozen=True)
class Command:
    """Write a picture of originals over their reconstructions."""

    checkpoint: Path
    """best.pt or last.pt of a run."""
    pictures: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Picture files; another size than the model's is scaled and cropped to it."""
    out: Path = Path("reconstructions.png")
    """The PNG to write."""
    device: str = "auto"
    """auto, cpu, cuda, or one GPU such as cuda:1."""


def main(arguments: list[str], signals: SignalHandler) -> None:
    """Run the command line; raises what `run_command` turns into exit codes."""
    command = tyro.cli(Command, args=arguments, prog="python -m vqae.reconstruct")
    if not command.pictures:
        raise UsageError("at least one picture must be given, got none")
    if command.out.suffix.lower() != ".png":
        raise UsageError(f"--out must be a .png file, got {command.out}")
    device = find_device(command.device)
    state = load_checkpoint(command.checkpoint)
    model = model_of(state).to(device).eval()
    originals = torch.stack([read_picture(file, model.image_size) for file in command.pictures])
    title = f"originals over reconstructions by {command.checkpoint.name}, trained on {state['dataset']}"
    plot_reconstructions(model, originals.to(device), command.out, title, columns=min(16, len(originals)))
    print(f"{len(originals)} pictures in {command.out}")
