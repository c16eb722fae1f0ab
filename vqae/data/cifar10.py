"""CIFAR-10, read by torchvision. It is downloaded at most once, and its checksums are always verified.

Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images",
https://www.cs.toronto.edu/~kriz/cifar.html
"""

import logging
import socket
import warnings
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import HTTPError, URLError

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5, check_integrity

from vqae.runtime.errors import UsageError

STALL_SECONDS = 20.0  # timeout of a server that sends nothing

_logger = logging.getLogger(__name__)


class DownloadError(UsageError):
    """CIFAR-10 is missing and cannot be downloaded."""


def read_cifar10(data_dir: Path, splits: Sequence[str]) -> list[Tensor]:
    """Read splits from data_dir/cifar-10-batches-py, in the order of the official files.

    If files are missing, data_dir/cifar-10-python.tar.gz is unpacked; if that is missing too, it is downloaded. The
    network is not used if the files are complete. Damaged files are an error, and are not changed.

    Returns [N, 3, 32, 32] uint8 for each split: 50,000 training images, 10,000 test images.

    Raises:
        DownloadError: CIFAR-10 is missing and cannot be downloaded.
        UsageError: data_dir is not a folder, or its files are truncated or damaged.
    """
    if data_dir.exists() and not data_dir.is_dir():
        raise UsageError(f"--data-dir must be a folder, but {data_dir} is a file")
    try:
        _complete(data_dir)
        return [_read_split(data_dir, split) for split in splits]
    except OSError as error:
        raise UsageError(f"CIFAR-10 in {data_dir} cannot be read: {error}") from error


def _complete(data_dir: Path) -> None:
    """Unpack or download what is missing, and raise UsageError if the checksum of a file is wrong."""
    folder, archive = data_dir / CIFAR10.base_folder, data_dir / CIFAR10.filename
    checksums = dict([*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])])
    damaged = [name for name, md5 in checksums.items() if not check_integrity(folder / name, md5)]
    if not damaged:
        return
    if archive.exists():
        if not check_integrity(archive, CIFAR10.tgz_md5):
            raise UsageError(
                f"{archive} is truncated or damaged: {archive.stat().st_size:,} bytes with MD5 "
                f"{calculate_md5(archive)}, but CIFAR-10 has {CIFAR10.tgz_md5}. Replace it, or delete it to download "
                "it again."
            )
        _logger.info("unpacking %s", archive)
        CIFAR10(data_dir, download=True)  # unpacks only, since the archive exists
    elif folder.exists():
        raise UsageError(
            f"{folder} is incomplete or damaged: {', '.join(damaged)} missing or with a wrong MD5 checksum. "
            "Delete the folder to download it again."
        )
    else:
        _download(data_dir)


def _download(data_dir: Path) -> None:
    """Download to a temporary folder, unpack and rename, so that an interruption leaves nothing behind."""
    _logger.info("downloading CIFAR-10 (170 MB) from %s into %s", CIFAR10.url, data_dir)
    timeout_before = socket.getdefaulttimeout()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(STALL_SECONDS)  # torchvision sets none
        with TemporaryDirectory(prefix=".cifar10-", dir=data_dir) as temporary_dir:
            CIFAR10(temporary_dir, download=True)
            folder = data_dir / CIFAR10.base_folder
            try:
                Path(temporary_dir, CIFAR10.base_folder).rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was faster
                    raise
    except (OSError, HTTPException, RuntimeError) as error:
        if isinstance(error, HTTPError):
            error.close()  # close the connection
        reason = str(error.reason) if type(error) is URLError else str(error) or type(error).__name__
        if isinstance(error, RuntimeError):  # torchvision raises it for a wrong checksum
            reason = "the downloaded file is truncated or damaged (wrong MD5 checksum)"
        raise DownloadError(
            f"CIFAR-10 is not in {data_dir} and cannot be downloaded from {CIFAR10.url}: {reason}. "
            f"Put {CIFAR10.filename} into {data_dir}, or use --data-dir with the folder that holds it."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout_before)


def _read_split(data_dir: Path, split: str) -> Tensor:
    """The images of a split, [N, 3, 32, 32] uint8."""
    with warnings.catch_warnings():
        # The official files are pickles from 2009, about which NumPy 2.4 warns.
        warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
        images = CIFAR10(data_dir, train=split == "train").data  # [N, 32, 32, 3], a view of [N, 3, 32, 32]
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
