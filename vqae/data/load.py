"""Load a data set by name, split it, and cut it into batches. Images are held in memory as uint8."""

import logging
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from vq_kernels.distributed import rank_and_world
from vqae.config import Dataset
from vqae.data.cifar10 import DownloadError, read_cifar10
from vqae.data.image_folder import read_image_folder
from vqae.data.synthetic import draw_images
from vqae.runtime.errors import UsageError

Split = Literal["train", "test"]

NUM_SYNTHETIC = {"train": 20_000, "test": 5_000}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Images:
    """The images of a data set."""

    train: Tensor  # [N, 3, H, W] uint8
    test: Tensor  # [M, 3, H, W] uint8
    dataset: str  # the data set that was loaded: "cifar10", "imagefolder" or "synthetic", never "auto"


def load_images(
    dataset: Dataset, data_dir: Path | None, *, image_size: int | None = None, seed: int = 0, **folder_options: Any
) -> Images:
    """Load both splits of a data set, always in the same order.

    Args:
        dataset: "cifar10" downloads CIFAR-10 if data_dir holds nothing of it. "imagefolder" reads
            data_dir/train/<class>/* and data_dir/test/<class>/*, or splits the images in data_dir. "synthetic"
            generates 20,000 training and 5,000 test images. "auto" is CIFAR-10 if it is in data_dir or can be
            downloaded, otherwise synthetic with a warning. A damaged CIFAR-10 is an error for "auto" too.
        data_dir: folder of the images. None is "data", but "imagefolder" requires a folder. "synthetic" ignores it.
        image_size: resize the shorter side of each image to this, antialiased, and crop the centre. None keeps the
            images (32 x 32 for synthetic ones), which must then have one size.
        seed: seed of the synthetic images, and of the split of an image folder without train/ and test/.
        folder_options: test_fraction and skip_unreadable of `read_image_folder`.

    Raises:
        UsageError: the data set is missing, damaged or not available, or an argument is out of range.
    """
    (train, test), name = _load_splits(dataset, data_dir, ("train", "test"), image_size, seed, folder_options)
    return Images(train, test, name)


def load_split(
    dataset: Dataset,
    data_dir: Path | None,
    split: Split,
    *,
    image_size: int | None = None,
    seed: int = 0,
    **folder: Any,
) -> tuple[Tensor, str]:
    """Load one split, [N, 3, H, W] uint8, and name the data set that was read. An image folder need not have the other.

    Arguments and errors are those of `load_images`.
    """
    (images,), actual_dataset = _load_splits(dataset, data_dir, (split,), image_size, seed, folder)
    return images, actual_dataset


def _load_splits(
    dataset: Dataset,
    data_dir: Path | None,
    splits: tuple[Split, ...],
    image_size: int | None,
    seed: int,
    folder_options: dict[str, Any],
) -> tuple[list[Tensor], str]:
    """The images of each split, and the data set that was read."""
    if image_size is not None and image_size < 1:
        raise UsageError(f"--image-size must be at least 1, got {image_size}")
    if dataset == "imagefolder":
        if data_dir is None:
            layout = "with images, or with DIR/train/<class>/ and DIR/test/<class>/"
            raise UsageError(f"--dataset imagefolder needs --data-dir DIR, {layout}")
        return read_image_folder(data_dir, splits, image_size, seed=seed, **folder_options), "imagefolder"
    if dataset in ("auto", "cifar10"):
        try:
            images = read_cifar10(data_dir or Path("data"), splits)
        except DownloadError as error:
            if dataset == "cifar10":
                raise
            _warn_of_synthetic(error)
        else:
            if image_size is not None:
                size = [image_size, image_size]
                images = [resize(split, size, InterpolationMode.BICUBIC, antialias=True) for split in images]
            return images, "cifar10"
    elif dataset != "synthetic":
        raise UsageError(f"--dataset must be auto, cifar10, imagefolder or synthetic, got {dataset}")
    side = image_size or 32
    return [draw_images(NUM_SYNTHETIC[split], split, image_size=side, seed=seed) for split in splits], "synthetic"


def _warn_of_synthetic(error: DownloadError) -> None:
    """Warn so clearly that nobody mistakes the results for those of CIFAR-10."""
    paragraphs = (
        "THE IMAGES ARE SYNTHETIC. The results of this run say nothing about CIFAR-10.",
        f"Reason: {error}",
        "Use --dataset cifar10 to stop with an error instead, or --dataset synthetic to suppress this warning.",
    )
    lines = [textwrap.fill(text, 98, break_long_words=False, break_on_hyphens=False) for text in paragraphs]
    _logger.warning("\n".join(["", "!" * 100, *lines, "!" * 100]))


# -- splits


def split_train(images: Tensor, limit: int | None, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Shuffle images [N, 3, H, W] by seed, take the first `limit`, and hold out a fraction of those for validation.

    Returns the training and the validation images; the latter may be empty. Raises UsageError if fewer than 2 training
    images are left.
    """
    order = torch.randperm(images.shape[0], generator=torch.Generator().manual_seed(seed))[:limit]
    num_val = round(val_fraction * order.numel())
    num_train = order.numel() - num_val
    if num_train < 2:
        options = f"--limit {limit}, --val-fraction {val_fraction}"
        raise UsageError(f"at least 2 images are needed to train on, got {num_train} of {images.shape[0]} ({options})")
    return images[order[num_val:]], images[order[:num_val]]


def fingerprints(*parts: Tensor) -> list[tuple[int, ...]]:
    """Shape and pixel sum of each tensor of images [N, 3, H, W] uint8, to tell data sets apart."""
    return [(*part.shape, int(part.sum())) for part in parts]


# -- batches


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """Move the images to the device if it has twice their size free, otherwise to pinned memory."""
    if device.type == "cuda" and 2 * images.nbytes > torch.cuda.mem_get_info(device)[0]:
        return images.pin_memory()
    return images.to(device)


def training_batches(
    images: Tensor, batch_size: int, device: torch.device, first_step: int = 0, *, flip: bool, seed: int, epoch: int
) -> Iterator[Tensor]:
    """Yield the batches of a training epoch from `first_step` on: this process's share of each, [B, 3, H, W] uint8.

    The order, and which half of the images is flipped, depend on (seed, epoch) alone, so a run can resume within an
    epoch. The last batch is dropped if it is incomplete. `batch_size` counts the images of all processes.
    """
    num_images = images.shape[0]
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(num_images, generator=generator).to(images.device)
    flipped = (torch.rand(num_images, generator=generator) < 0.5).to(device) if flip else None
    for start in range(first_step * batch_size, num_images - batch_size + 1, batch_size):
        rows = _own_rows(start, batch_size)
        batch = images[order[rows]].to(device, non_blocking=True)
        if flipped is not None:
            batch = torch.where(flipped[rows][:, None, None, None], batch.flip(3), batch)
        yield batch


def evaluation_batches(images: Tensor, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Yield all images in order: this process's share of each batch, [B, 3, H, W] on the device, perhaps empty."""
    for start in range(0, images.shape[0], batch_size):
        rows = _own_rows(start, min(batch_size, images.shape[0] - start))
        yield images[rows].to(device, non_blocking=True)


def _own_rows(start: int, count: int) -> slice:
    """This process's share of `count` rows from `start`. Shares are in rank order and differ by at most one row."""
    rank, world_size = rank_and_world(synchronise=True)
    return slice(start + rank * count // world_size, start + (rank + 1) * count // world_size)
