"""Image folders in the layout of torchvision's ImageFolder: DIR/train/<class>/* and DIR/test/<class>/*.

Images are decoded in one thread. Two are not faster, because most of the time is spent in Python.
"""

import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import make_dataset
from tqdm import tqdm

from vqae.runtime.errors import UsageError

# The exceptions that Pillow raises for files that are damaged or not images. Not Exception, so that an exception raised
# by a signal handler is not caught.
_IMAGE_ERRORS = (
    *(OSError, RuntimeError, MemoryError, SyntaxError, ValueError, EOFError, IndexError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


def read_image_folder(data_dir: Path, splits: Sequence[str], image_size: int | None) -> list[Tensor]:
    """Read splits of an image folder, each sorted by path. Hidden files and folders are ignored.

    Greyscale, palette and transparent images become RGB. If `image_size` is given, the shorter side of each is resized
    to it, antialiased, and the centre is cropped. All splits are listed before any image is decoded.

    Returns [N, 3, H, W] uint8 for each split, with the same H and W. Raises UsageError if a folder is missing or empty,
    a file is damaged or not an image, or the images differ in size and `image_size` is None.
    """
    if not data_dir.is_dir():
        problem = "is a file" if data_dir.exists() else "does not exist"
        raise UsageError(f"--data-dir must be a folder, but {data_dir} {problem}")
    try:
        paths = [_list_images(data_dir / split) for split in splits]
    except OSError as error:
        raise UsageError(f"{data_dir} cannot be read: {error}") from error
    size = None if image_size is None else (image_size, image_size)
    first = paths[0][0]
    shape = _decode(first, size).shape
    images = [np.empty((len(files), 3, *shape[:2]), dtype=np.uint8) for files in paths]
    for split, files, decoded in zip(splits, paths, images, strict=True):
        # disable=None: no progress bar if stderr is not a terminal
        for index, path in enumerate(tqdm(files, desc=f"reading {split}", unit=" images", leave=False, disable=None)):
            pixels = _decode(path, size)
            if pixels.shape != shape:
                raise UsageError(
                    f"the images differ in size, but --image-size is not given: {first} is {shape[1]} x {shape[0]}, "
                    f"{path} is {pixels.shape[1]} x {pixels.shape[0]}"
                )
            decoded[index] = pixels.transpose(2, 0, 1)
    return [torch.from_numpy(decoded) for decoded in images]


def read_image(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """Read one image file as RGB [3, H, W] uint8, scaled and cropped to `size` (H, W) if given.

    Raises UsageError if the file is missing, damaged or not an image.
    """
    return torch.from_numpy(_decode(str(path), size).transpose(2, 0, 1).copy())


def _list_images(folder: Path) -> list[str]:
    """The paths folder/<class>/*, sorted by class and path. Every file that is not hidden must be an image."""
    if not folder.is_dir():
        raise UsageError(f"{folder.parent} must hold the folder {folder.name}/, with one folder per class")
    classes = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    for entry in classes:
        if not entry.is_dir():
            raise UsageError(f"{entry} is not in the folder of a class: images must be in {folder}/<class>/")
    if not classes:
        raise UsageError(f"{folder} is empty: it must hold one folder per class, with images")

    def is_visible(path: str) -> bool:
        return not any(part.startswith(".") for part in Path(path).relative_to(folder).parts)

    indices = {entry.name: index for index, entry in enumerate(classes)}
    samples = make_dataset(str(folder), indices, is_valid_file=is_visible, allow_empty=True)
    empty = set(indices.values()) - {index for _, index in samples}
    if empty:
        raise UsageError(f"{classes[min(empty)]} is empty: the folder of a class must hold at least one image")
    return [path for path, _ in samples]


def _decode(path: str, size: tuple[int, int] | None) -> npt.NDArray[np.uint8]:
    """Decode an image to RGB [H, W, 3], scaled to cover `size` and cropped to it if given."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # about metadata
            image.load()
            rgb = _to_rgb(image)
    except _IMAGE_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise UsageError(f"{path} is damaged, not an image or not readable: {reason}") from error
    if size is not None:
        rgb = ImageOps.fit(rgb, (size[1], size[0]), method=Image.Resampling.BICUBIC)
    return np.asarray(rgb)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB. Transparency is dropped."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit values at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers of unknown range (mode {image.mode})")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # Pillow warns about a direct conversion
    return image if image.mode == "RGB" else image.convert("RGB")
