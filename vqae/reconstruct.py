"""Reconstruct images: `python -m vqae.reconstruct --help`."""

from __future__ import annotations

if __name__ == "__main__":
    from vqae.runtime.process import run_command

    run_command("vqae.reconstruct")  # imports this module again, after the signal handlers are installed

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from vqae.config import find_device
from vqae.data.image_folder import check_outside, list_files, read_folders, read_images
from vqae.model.vqae import model_from_checkpoint
from vqae.runtime.errors import UsageError
from vqae.runtime.process import SignalHandler, program
from vqae.training.checkpoint import load_checkpoint
from vqae.training.report import plot_reconstructions


@dataclass(frozen=True)
class Command:
    """Plot images above their reconstructions."""

    checkpoint: Path
    """best.pt or last.pt of a run."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, and folders with images at any depth. They are scaled and cropped to the model's image size."""
    out: Path = Path("reconstructions.png")
    """PNG file to write."""
    limit: int = 256
    """Take only the first N files."""
    skip_unreadable: bool = False
    """Skip and count files that are damaged or not images. By default, the first one is an error."""
    device: str = "auto"
    """auto, cpu, cuda, or a GPU such as cuda:1."""


def main(arguments: list[str], signals: SignalHandler) -> None:
    """Run the command line. Raises the exceptions that `run_command` turns into exit codes."""
    command = tyro.cli(Command, args=arguments, prog=program("reconstruct"))
    if not command.images:
        raise UsageError("at least one image must be given, got none")
    if command.out.suffix.lower() != ".png":
        raise UsageError(f"--out must be a .png file, got {command.out}")
    if command.limit < 1:
        raise UsageError(f"--limit must be at least 1, got {command.limit}")
    device = find_device(command.device)
    state = load_checkpoint(command.checkpoint)
    model = model_from_checkpoint(state).to(device).eval()
    folders = [path for path in command.images if os.path.isdir(path)]
    check_outside(command.out.parent, [*folders, *_folders_of_run(state)])
    files = [file for path in command.images for file in (list_files(path) if path in folders else [path])]
    if os.path.realpath(command.out) in map(os.path.realpath, files):
        raise UsageError(f"--out must not be one of the images, got {command.out}")
    if not files:
        raise UsageError(f"{', '.join(map(str, command.images))} holds no images")
    paths = [str(file) for file in files[: command.limit]]
    originals, _ = read_images(paths, model.image_size, command.skip_unreadable)
    title = f"originals above reconstructions by {command.checkpoint.name}, trained on {state['dataset']}"
    plot_reconstructions(model, originals.to(device), command.out, title, columns=min(16, len(originals)))
    of = f" of {len(files)}" if len(files) > command.limit else ""
    print(f"{len(originals)}{of} images in {command.out}")


def _folders_of_run(state: dict[str, Any]) -> list[Path]:
    """The folders that a run on an image folder has read."""
    data_dir = state["config"].get("data_dir")
    return read_folders(Path(data_dir)) if data_dir and state["dataset"] == "imagefolder" else []
