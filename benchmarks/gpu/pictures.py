"""CIFAR-10's pictures on the device, read once a machine: decoding them takes longer than most uses."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from train_runs import find_dataset

from gpu.stage import Context
from vqae.data.load import load_images

_REHEARSED = {"train": 24, "test": 8}
_REHEARSED_SIDE = 12


def load_pictures(context: Context) -> Tensor | None:
    """All pictures, training and test, [M, 3, H, W] uint8 on the device; None where no --data-dir is given."""
    if context.data_dir is None and not context.rehearse:
        return None
    kept = context.work / "pictures.pt"
    if kept.exists():
        pictures: Tensor = torch.load(kept, weights_only=True)
    else:
        folder = picture_folder(context)
        read = load_images(find_dataset(None, folder), folder)
        pictures = torch.cat([read.train, read.test])
        torch.save(pictures, kept)
    return pictures.to(context.device)


def picture_flags(context: Context) -> list[str]:
    """What tells the commands of vqae which pictures to take."""
    folder = picture_folder(context).resolve()
    return ["--dataset", find_dataset(None, folder), "--data-dir", str(folder)]


def picture_folder(context: Context) -> Path:
    """Where the pictures are: --data-dir; in a rehearsal a folder of noise.

    Raises:
        ValueError: there is none.
    """
    if not context.rehearse:
        if context.data_dir is None:
            raise ValueError("--data-dir must be given for pictures, got none")
        return context.data_dir
    folder = context.work / "noise"
    generator = torch.Generator().manual_seed(0)
    for split, count in _REHEARSED.items():
        (folder / split / "noise").mkdir(parents=True, exist_ok=True)
        shape = (count, _REHEARSED_SIDE, _REHEARSED_SIDE, 3)
        for number, pixels in enumerate(torch.randint(256, shape, generator=generator, dtype=torch.uint8)):
            Image.fromarray(pixels.numpy()).save(folder / split / "noise" / f"{number:02}.png")
    return folder
