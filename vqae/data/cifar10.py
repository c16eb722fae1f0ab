"""CIFAR-10 as torchvision reads it, downloaded at most once and checked every time.

Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images",
https://www.cs.toronto.edu/~kriz/cifar.html
"""

import logging
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import HTTPError, URLError

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5, check_integrity

from vqae.runtime.errors import UsageError

# A server that sends nothing for this long is given up.
STALL_SECONDS = 20.0

_logger = logging.getLogger(__name__)


class DownloadError(UsageError):
    """CIFAR-10 is not there and cannot be downloaded; nothing that was there is damaged."""


def read_cifar10(data_dir: Path, splits: Sequence[str]) -> list[Tensor]:
    """The splits that are asked for, from data_dir/cifar-10-batches-py, in the order of the official files.

    What is missing is unpacked from data_dir/cifar-10-python.tar.gz, or downloaded where that is missing as well.
    Where all is there, the network is not touched. What is damaged and cannot be unpacked anew is an error and is left
    as it is: it is the user's, and may be of use.

    Args:
        data_dir: created where it does not exist.
        splits: each "train" or "test".

    Returns:
        For each split [N, 3, 32, 32] uint8: 50,000 images to train, 10,000 to test.

    Raises:
        DownloadError: nothing of CIFAR-10 is there, and it cannot be downloaded.
        UsageError: data_dir is not a folder, or what lies there is cut short or damaged.
    """
    if data_dir.exists() and not data_dir.is_dir():
        raise UsageError(f"--data-dir must be a folder, but {data_dir} is a file")
    try:
        _make_complete(data_dir)
        return [_read_batches(data_dir, split) for split in splits]
    except OSError as error:
        raise UsageError(f"CIFAR-10 in {data_dir} cannot be read: {error}") from error


def _make_complete(data_dir: Path) -> None:
    """See to it that every official file is there with its checksum, or raise UsageError."""
    folder = data_dir / CIFAR10.base_folder
    archive = data_dir / CIFAR10.filename
    checksums = dict([*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])])
    damaged = [name for name, md5 in checksums.items() if not check_integrity(folder / name, md5)]
    if not damaged:
        return
    if archive.exists():
        if not check_integrity(archive, CIFAR10.tgz_md5):
            raise UsageError(
                f"{archive} is cut short or damaged: {archive.stat().st_size:,} bytes with MD5 "
                f"{calculate_md5(archive)}, where CIFAR-10's is {CIFAR10.tgz_md5}. "
                "Delete it to have it downloaded again, or put the whole archive in its place."
            )
        _logger.info("unpacking %s", archive)
        CIFAR10(data_dir, download=True)  # unpacks alone: the archive is there
    elif folder.exists():
        raise UsageError(
            f"{folder} is incomplete or damaged: {', '.join(damaged)} missing or with a wrong MD5 checksum. "
            "Delete the folder to have it downloaded again."
        )
    else:
        _download(data_dir)


def _download(data_dir: Path) -> None:
    """Download and unpack into data_dir all at once: an interruption leaves no half of it behind."""
    _logger.info("downloading CIFAR-10 (170 MB) from %s into %s", CIFAR10.url, data_dir)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".cifar10-", dir=data_dir) as temporary_dir, _stalls_end():
            CIFAR10(temporary_dir, download=True)
            folder = data_dir / CIFAR10.base_folder
            try:
                Path(temporary_dir, CIFAR10.base_folder).rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster, and its copy serves as well
                    raise
    except (OSError, HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()  # it holds the connection
        reason = str(error.reason) if type(error) is URLError else str(error)
        raise DownloadError(_download_advice(data_dir, reason or type(error).__name__)) from error
    except RuntimeError as error:  # torchvision's word for a checksum that does not fit
        reason = "what arrived is cut short or damaged (its MD5 checksum is wrong)"
        raise DownloadError(_download_advice(data_dir, reason)) from error


@contextmanager
def _stalls_end() -> Iterator[None]:
    """Give every connection opened inside a time limit; torchvision sets none, and would wait for ever."""
    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(timeout_before)


def _download_advice(data_dir: Path, reason: str) -> str:
    return (
        f"CIFAR-10 is not in {data_dir} and cannot be downloaded from {CIFAR10.url}: {reason}. "
        f"Put {CIFAR10.filename} into {data_dir}, or name the folder that holds it with --data-dir."
    )


def _read_batches(data_dir: Path, split: str) -> Tensor:
    """The images of one split, [N, 3, 32, 32] uint8."""
    with warnings.catch_warnings():
        # The official files are pickles of 2009, written with a spelling that NumPy 2.4 no longer likes.
        warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
        images = CIFAR10(data_dir, train=split == "train").data  # [N, 32, 32, 3], a view of [N, 3, 32, 32]
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
