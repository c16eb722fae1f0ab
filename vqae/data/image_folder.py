"""Image folders, in the layout of torchvision's ImageFolder, DIR/train/<class>/* and DIR/test/<class>/*, or flat.

In a flat folder, without train/ and test/, each image below it belongs to the split that its path and a seed decide.
Images are decoded in one thread. Two are not faster, because most of the time is spent in Python.
"""

import contextlib
import hashlib
import logging
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from vqae.runtime.errors import UsageError

# The exceptions that Pillow raises for files that are damaged or not images. Not Exception, so that an exception raised
# by a signal handler is not caught.
_IMAGE_ERRORS = (
    *(OSError, RuntimeError, MemoryError, SyntaxError, ValueError, EOFError, IndexError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


BACKGROUND = (255, 255, 255)  # RGB colour behind transparent pixels

_logger = logging.getLogger(__name__)


def read_image_folder(
    data_dir: Path,
    splits: Sequence[str],
    image_size: int | None,
    *,
    test_fraction: float = 0.1,
    seed: int = 0,
    skip_unreadable: bool = False,
) -> list[Tensor]:
    """Read splits of an image folder, each sorted by folder and name. Hidden files and folders are ignored.

    A folder without train/ and test/ is flat: all images below it are split by `split_files`. All splits are listed
    before any image is decoded.

    Images are rotated as their EXIF data say. Transparent pixels are blended with `BACKGROUND`. Greyscale and palette
    images become RGB. If `image_size` is given, the shorter side of each is resized to it, antialiased, and the centre
    is cropped. With `skip_unreadable`, files that are damaged or not images are skipped, and a warning counts them.

    Returns [N, 3, H, W] uint8 for each split, with the same H and W. Raises UsageError if a folder is missing or empty,
    a file is damaged or not an image, no image is left, or the images differ in size and `image_size` is None.
    """
    if not os.path.isdir(data_dir):
        problem = "is a file" if os.path.exists(data_dir) else "does not exist"
        raise UsageError(f"--data-dir must be a folder, but {data_dir} {problem}")
    try:
        flat = list_files(data_dir) if read_folders(data_dir) == [data_dir] else []
        parts = split_files(data_dir, flat, test_fraction, seed) if flat else {}
        paths = [parts[split] if flat else _list_images(data_dir / split) for split in splits]
    except OSError as error:
        raise UsageError(f"{data_dir} cannot be read: {error}") from error
    size = None if image_size is None else (image_size, image_size)
    images, are_read = read_images([path for files in paths for path in files], size, skip_unreadable)
    counts = [int(part.sum()) for part in torch.split(are_read, [len(files) for files in paths])]
    for split, count in zip(splits, counts, strict=True):
        if not count:
            raise UsageError(f"none of the {split} images of {data_dir} can be read")
    return list(torch.split(images, counts))


def read_images(paths: Sequence[str], size: tuple[int, int] | None, skip_unreadable: bool) -> tuple[Tensor, Tensor]:
    """Read image files as RGB, scaled and cropped to `size` (H, W) if given.

    Returns the images [N, 3, H, W] uint8, and which of the paths they are, [P] bool. Raises UsageError if the images
    differ in size, a file cannot be read and `skip_unreadable` is False, or none can be read.
    """
    images, first = np.empty((0, 3, 0, 0), dtype=np.uint8), ""
    are_read = torch.zeros(len(paths), dtype=torch.bool)
    count = 0
    # disable=None: no progress bar if stderr is not a terminal
    for index, path in enumerate(tqdm(paths, desc="reading", unit=" images", leave=False, disable=None)):
        try:
            pixels = _decode(path, size).transpose(2, 0, 1)
        except UsageError:
            if skip_unreadable:
                continue
            raise
        if not count:
            images, first = np.empty((len(paths), *pixels.shape), dtype=np.uint8), path
        if pixels.shape != images.shape[1:]:
            sizes = f"{first} is {images.shape[3]} x {images.shape[2]}, {path} is {pixels.shape[2]} x {pixels.shape[1]}"
            raise UsageError(f"the images differ in size, but --image-size is not given: {sizes}")
        images[count] = pixels
        are_read[index] = True
        count += 1
    if not count:
        raise UsageError(f"none of the {len(paths)} files can be read as an image, {paths[0]} for example")
    if count < len(paths):
        unread = paths[int(are_read.int().argmin())]
        _logger.warning("skipped %d of %d files, which cannot be read: %s ...", len(paths) - count, len(paths), unread)
    return torch.from_numpy(images[:count]), are_read


def list_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted by their folder and name. What is hidden is left out, and links are followed."""
    return [Path(directory, name) for directory, names in sorted(_walk(folder)) for name in sorted(names)]


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The folder and those below it, each once, with the names of their files."""

    def fail(error: OSError) -> None:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}") from error

    seen = set()
    for directory, subfolders, names in os.walk(folder, onerror=fail, followlinks=True):
        if (real := os.path.realpath(directory)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield directory, [name for name in names if not name.startswith(".")]


def read_folders(data_dir: Path) -> list[Path]:
    """The folders of an image folder in which every file is read as an image."""
    splits = [folder for split in ("train", "test") if os.path.isdir(folder := data_dir / split)]
    return splits or [data_dir]


def check_outside(out: Path, folders: Sequence[Path]) -> None:
    """Raise UsageError if a file in the folder `out` would be read as one of the images in these folders."""
    target = Path(os.path.realpath(out))
    for folder in filter(os.path.isdir, folders):
        walked = {os.path.realpath(directory) for directory, _ in _walk(folder)}
        for path in (target, *target.parents):
            if str(path) in walked:
                raise UsageError(f"--out must be outside {folder}, where every file is read as an image, got {out}")
            if path.name.startswith("."):
                break  # hidden, if it is in the folder


def split_files(folder: Path, files: Sequence[Path], test_fraction: float, seed: int) -> dict[str, list[str]]:
    """Split files by the hash of the seed and of their path in `folder`, and keep their order.

    The hash decides the order in which files are taken for the test split, so that most files keep their split when
    others are added. Each split gets at least one of two files. Raises UsageError if there is only one.
    """
    if len(files) < 2:
        raise UsageError(f"{folder} must hold at least 2 images to be split into train and test, got {len(files)}")

    def draw(file: Path) -> bytes:
        return hashlib.sha256(f"{seed} {file.relative_to(folder).as_posix()}".encode(errors="surrogateescape")).digest()

    num_test = min(max(1, round(test_fraction * len(files))), len(files) - 1)
    test = set(sorted(files, key=draw)[:num_test])
    return {split: [str(file) for file in files if (file in test) == (split == "test")] for split in ("train", "test")}


def _list_images(folder: Path) -> list[str]:
    """The paths folder/<class>/*, sorted by class, folder and name. Every file that is not hidden must be an image."""
    if not folder.is_dir():
        raise UsageError(
            f"{folder.parent} must hold the folder {folder.name}/, with one folder per class, or images without train/ "
            "and test/"
        )
    classes = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    for entry in classes:
        if not entry.is_dir():
            raise UsageError(f"{entry} is not in the folder of a class: images must be in {folder}/<class>/")
    if not classes:
        raise UsageError(f"{folder} is empty: it must hold one folder per class, with images")
    files = {entry: list_files(entry) for entry in classes}
    for entry in classes:
        if not files[entry]:
            raise UsageError(f"{entry} is empty: the folder of a class must hold at least one image")
    return [str(file) for entry in classes for file in files[entry]]


def _decode(path: str, size: tuple[int, int] | None) -> npt.NDArray[np.uint8]:
    """Decode an image to RGB [H, W, 3], scaled to cover `size` and cropped to it if given."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # about metadata
            image.load()
            with contextlib.suppress(*_IMAGE_ERRORS):  # damaged EXIF data say nothing about the rotation
                ImageOps.exif_transpose(image, in_place=True)
            rgb = _to_rgb(image)
    except _IMAGE_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise UsageError(f"{path} is damaged, not an image or not readable: {reason}") from error
    if size is not None:
        rgb = ImageOps.fit(rgb, (size[1], size[0]), method=Image.Resampling.BICUBIC)
    return np.asarray(rgb)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB. Transparent pixels are blended with `BACKGROUND`."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit values at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers of unknown range (mode {image.mode})")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        background = Image.new("RGBA", image.size, BACKGROUND)
        image = Image.alpha_composite(background, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")
