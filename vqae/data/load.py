"""One door to all the data sets: which one is meant, where it lies, and what is done where it is not to be had."""

import logging
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from vqae.data.cifar10 import DownloadError, read_cifar10
from vqae.data.image_folder import read_image_folder
from vqae.data.synthetic import draw_pictures
from vqae.runtime.errors import UsageError

Dataset = Literal["auto", "cifar10", "imagefolder", "synthetic"]
Split = Literal["train", "test"]

DEFAULT_DATA_DIR = Path("data")
NUM_SYNTHETIC = {"train": 20_000, "test": 5_000}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pictures:
    """The pictures of one data set.

    Attributes:
        train: [N, 3, H, W] uint8.
        test: [M, 3, H, W] uint8.
        dataset: "cifar10", "imagefolder" or "synthetic": what was really read, never "auto".
    """

    train: Tensor
    test: Tensor
    dataset: str


def load_pictures(dataset: Dataset, data_dir: Path | None, *, image_size: int | None = None, seed: int = 0) -> Pictures:
    """Both splits of a data set, in an order that is the same on every run.

    Args:
        dataset: "cifar10" is torchvision's, downloaded where data_dir holds nothing of it. "imagefolder" is
            data_dir/train/<class>/* and data_dir/test/<class>/*. "synthetic" is drawn by a program, 20,000 pictures
            to train and 5,000 to test. "auto" is CIFAR-10 where it is in data_dir or can be downloaded, else
            synthetic with a warning; a CIFAR-10 that is there and damaged is an error, as it is for "cifar10".
        data_dir: where the pictures lie; "data" where None, except that "imagefolder" needs one. Not used by
            "synthetic".
        image_size: height and width that every picture gets: the shorter side is resized, antialiased, and the
            centre cut out. None keeps the pictures as they are (32 x 32 for synthetic ones), which then must all
            have one size.
        seed: of the synthetic pictures; the others do not use it.

    Returns:
        Pictures(train [N, 3, H, W] uint8, test [M, 3, H, W] uint8, dataset).

    Raises:
        UsageError: the data set is missing, damaged or not to be had, or an argument is out of range.
    """
    (train, test), actual_dataset = _read(dataset, data_dir, ("train", "test"), image_size, seed)
    return Pictures(train, test, actual_dataset)


def load_split(
    dataset: Dataset, data_dir: Path | None, split: Split, *, image_size: int | None = None, seed: int = 0
) -> tuple[Tensor, str]:
    """One split alone, the same pictures as `load_pictures` returns; the other need not exist in an image folder.

    Args:
        dataset: as in `load_pictures`.
        data_dir: as in `load_pictures`.
        split: "train" or "test".
        image_size: as in `load_pictures`.
        seed: as in `load_pictures`.

    Returns:
        The pictures, [N, 3, H, W] uint8, and the data set that was really read.

    Raises:
        UsageError: as in `load_pictures`.
    """
    (pictures,), actual_dataset = _read(dataset, data_dir, (split,), image_size, seed)
    return pictures, actual_dataset


def _read(
    dataset: Dataset, data_dir: Path | None, splits: tuple[Split, ...], image_size: int | None, seed: int
) -> tuple[list[Tensor], str]:
    """The pictures of each split, and the data set that they come from."""
    if image_size is not None and image_size < 1:
        raise UsageError(f"--image-size must be at least 1, got {image_size}")
    if dataset == "imagefolder":
        if data_dir is None:
            raise UsageError(
                "--dataset imagefolder needs --data-dir DIR, with DIR/train/<class>/ and DIR/test/<class>/"
            )
        return read_image_folder(data_dir, splits, image_size), "imagefolder"
    if dataset in ("auto", "cifar10"):
        folder = DEFAULT_DATA_DIR if data_dir is None else data_dir
        try:
            pictures = read_cifar10(folder, splits)
        except DownloadError as error:
            if dataset == "cifar10":
                raise
            _warn_of_synthetic(error)
        else:
            return [_resized(split, image_size) for split in pictures], "cifar10"
    elif dataset != "synthetic":
        raise UsageError(f"--dataset must be auto, cifar10, imagefolder or synthetic, got {dataset}")
    size = 32 if image_size is None else image_size
    return [draw_pictures(NUM_SYNTHETIC[split], split, image_size=size, seed=seed) for split in splits], "synthetic"


def _resized(pictures: Tensor, image_size: int | None) -> Tensor:
    """Square pictures [N, 3, H, H] at another size, antialiased."""
    if image_size is None or image_size == pictures.shape[-1]:
        return pictures
    resized: Tensor = resize(pictures, [image_size, image_size], InterpolationMode.BICUBIC, antialias=True)
    return resized


def _warn_of_synthetic(error: DownloadError) -> None:
    """Say, so that nobody takes the results for CIFAR-10's, that the pictures are synthetic, and why."""
    rule = "!" * 100
    reason = textwrap.fill(f"Why: {error}", 96, break_long_words=False, break_on_hyphens=False)
    message = (
        "THE PICTURES ARE SYNTHETIC: CIFAR-10 could not be had, and --dataset auto goes on without it.\n"
        "Every figure of this run is about pictures drawn by a program, and says nothing about CIFAR-10.\n\n"
        f"{reason}\n\n"
        "--dataset cifar10 stops here instead; --dataset synthetic does without this warning."
    )
    _logger.warning("\n%s\n%s\n%s", rule, textwrap.indent(message, "  "), rule)
