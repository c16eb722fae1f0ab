"""Anyone's images, in the layout of torchvision's ImageFolder: DIR/train/<class>/* and DIR/test/<class>/*.

One thread decodes with Pillow: 55,000 JPEG images of 32 x 32 take some 12 s. Two threads were no faster, for most of
that time is Python's own, and a loop ends at once when it is interrupted.
"""

import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import make_dataset
from tqdm import tqdm

from vqae.runtime.errors import UsageError

# What Pillow raises at files that are no image, are cut short or damaged. Not Exception: an exception that a signal
# handler raises while an image is being read must pass.
_IMAGE_ERRORS = (
    OSError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_image_folder(data_dir: Path, splits: Sequence[str], image_size: int | None) -> list[Tensor]:
    """The splits that are asked for, each in the order of its sorted paths. Hidden files and folders are left out.

    Grey, palette and transparent images become RGB. All splits are looked through before an image is decoded.

    Args:
        data_dir: holds a folder for each split, which holds a folder for each class.
        splits: each "train" or "test".
        image_size: resize the shorter side to this, antialiased, and cut out the centre; None keeps the images as
            they are.

    Returns:
        For each split [N, 3, H, W] uint8; H and W are the same for all.

    Raises:
        UsageError: a folder is missing or empty, a file is no image or is damaged, or the images have several
            sizes and image_size is None.
    """
    if not data_dir.exists():
        raise UsageError(f"--data-dir must be a folder, but {data_dir} does not exist")
    if not data_dir.is_dir():
        raise UsageError(f"--data-dir must be a folder, but {data_dir} is a file")
    try:
        paths = {split: _list_images(data_dir / split) for split in splits}
    except OSError as error:
        raise UsageError(f"{data_dir} cannot be read: {error}") from error
    first_path = paths[splits[0]][0]
    size = None if image_size is None else (image_size, image_size)
    with _quiet_pillow():
        first_shape = _decode(first_path, size).shape
        return [_read_images(paths[split], split, size, first_path, first_shape) for split in splits]


def read_image(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """One image file, read as those of an image folder are.

    Args:
        path: a file in any format that Pillow reads.
        size: (H, W) to scale and crop it to; None keeps it as it is.

    Returns:
        [3, H, W] uint8.

    Raises:
        UsageError: the file is missing, is no image or is damaged.
    """
    with _quiet_pillow():
        return torch.from_numpy(_decode(str(path), size).transpose(2, 0, 1).copy())


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Pillow warns of odd metadata, which nothing here reads; odd pixels it raises at."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        yield


def _list_images(folder: Path) -> list[str]:
    """The paths of folder/<class>/*, sorted by class and then by path; every file there is taken for an image."""
    if not folder.is_dir():
        raise UsageError(f"{folder.parent} must hold the folder {folder.name}/, with one folder for each class in it")
    visible = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    for entry in visible:
        if not entry.is_dir():
            raise UsageError(f"{entry} lies outside a class's folder: images belong into {folder}/<class>/")
    if not visible:
        raise UsageError(f"{folder} is empty: it must hold one folder for each class, with images in it")

    def is_visible(path: str) -> bool:
        return not any(part.startswith(".") for part in Path(path).relative_to(folder).parts)

    class_to_index = {entry.name: index for index, entry in enumerate(visible)}
    samples = make_dataset(str(folder), class_to_index, is_valid_file=is_visible, allow_empty=True)
    classes_found = {index for _, index in samples}
    for name, index in class_to_index.items():
        if index not in classes_found:
            raise UsageError(f"{folder / name} is empty: every class's folder must hold at least one image")
    return [path for path, _ in samples]


def _read_images(
    paths: list[str], split: str, size: tuple[int, int] | None, first_path: str, first_shape: tuple[int, ...]
) -> Tensor:
    """All images of a split, [N, 3, H, W] uint8, each of first_shape [H, W, 3]."""
    height, width, channels = first_shape
    images = np.empty((len(paths), channels, height, width), dtype=np.uint8)
    # disable=None: no bar where stderr is no terminal
    for index, path in enumerate(tqdm(paths, desc=f"reading {split}", unit=" images", leave=False, disable=None)):
        pixels = _decode(path, size)
        if pixels.shape != first_shape:
            raise UsageError(
                f"the images have several sizes, and --image-size is not given: {first_path} is "
                f"{width} x {height}, {path} is {pixels.shape[1]} x {pixels.shape[0]}"
            )
        images[index] = pixels.transpose(2, 0, 1)
    return torch.from_numpy(images)


def _decode(path: str, size: tuple[int, int] | None) -> npt.NDArray[np.uint8]:
    """One image, [H, W, 3]; scaled to cover (H, W) and cropped to it, where a size is given."""
    try:
        with Image.open(path) as image:
            image.load()
            rgb = _to_rgb(image)
    except _IMAGE_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise UsageError(f"{path} is no image, is damaged or cannot be read: {reason}") from error
    if size is not None:
        rgb = ImageOps.fit(rgb, (size[1], size[0]), method=Image.Resampling.BICUBIC)
    return np.asarray(rgb)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any image in 8-bit RGB; transparency is dropped."""
    if image.mode.startswith("I;16"):  # Pillow would clip its 65,536 greys to 255 instead of scaling them
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers of no known range (mode {image.mode})")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # straight to RGB, Pillow warns
    return image if image.mode == "RGB" else image.convert("RGB")
