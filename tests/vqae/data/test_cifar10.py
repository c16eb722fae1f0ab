"""CIFAR-10: read, unpacked, downloaded; and what is said where that cannot be done."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision.datasets.utils
from torchvision.datasets import CIFAR10

from tests.vqae.data.conftest import ImageServer, TinyCifar10
from vqae.data import cifar10
from vqae.data.cifar10 import DownloadError, read_cifar10
from vqae.runtime.errors import UsageError


def test_reads_both_splits_in_the_files_order(tiny_cifar10: TinyCifar10, tmp_path: Path) -> None:
    tiny_cifar10.write_folder(tmp_path)
    train, test = read_cifar10(tmp_path, ["train", "test"])
    assert train.dtype == test.dtype == torch.uint8
    assert train.is_contiguous()
    assert torch.equal(train, torch.from_numpy(tiny_cifar10.train))
    assert torch.equal(test, torch.from_numpy(tiny_cifar10.test))


def test_complete_folder_needs_no_network(tiny_cifar10: TinyCifar10, server: ImageServer, tmp_path: Path) -> None:
    tiny_cifar10.write_folder(tmp_path)
    read_cifar10(tmp_path, ["test"])
    assert server.num_requests == 0


def test_unpacks_an_archive_without_network(tiny_cifar10: TinyCifar10, server: ImageServer, tmp_path: Path) -> None:
    tiny_cifar10.write_archive(tmp_path)
    (test,) = read_cifar10(tmp_path, ["test"])
    assert torch.equal(test, torch.from_numpy(tiny_cifar10.test))
    assert server.num_requests == 0


def test_archive_replaces_damaged_files(tiny_cifar10: TinyCifar10, tmp_path: Path) -> None:
    folder = tiny_cifar10.write_folder(tmp_path)
    (folder / "data_batch_3").write_bytes(b"half")
    (folder / "test_batch").unlink()
    tiny_cifar10.write_archive(tmp_path)
    (train,) = read_cifar10(tmp_path, ["train"])
    assert torch.equal(train, torch.from_numpy(tiny_cifar10.train))


def test_downloads_once(tiny_cifar10: TinyCifar10, server: ImageServer, tmp_path: Path) -> None:
    data_dir = tmp_path / "new" / "data"
    (train,) = read_cifar10(data_dir, ["train"])
    num_requests = server.num_requests
    assert num_requests > 0
    assert torch.equal(train, torch.from_numpy(tiny_cifar10.train))
    assert [path.name for path in data_dir.iterdir()] == ["cifar-10-batches-py"]
    read_cifar10(data_dir, ["test"])
    assert server.num_requests == num_requests


def test_download_by_another_process_is_used(
    tiny_cifar10: TinyCifar10, server: ImageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def construct(root: Path, **arguments: bool) -> CIFAR10:
        if arguments.get("download"):
            tiny_cifar10.write_folder(tmp_path)  # the other process
        return CIFAR10(root, **arguments)

    construct.__dict__.update({name: getattr(CIFAR10, name) for name in dir(CIFAR10) if not name.startswith("__")})
    monkeypatch.setattr(cifar10, "CIFAR10", construct)
    (test,) = read_cifar10(tmp_path, ["test"])
    assert torch.equal(test, torch.from_numpy(tiny_cifar10.test))


def _cut(server: ImageServer) -> None:
    server.num_bytes //= 2


def _not_found(server: ImageServer) -> None:
    server.status = 404


def _stall(server: ImageServer) -> None:
    server.num_bytes //= 2
    server.stalls = True


def _damage(server: ImageServer) -> None:
    server.archive = server.archive[:-1] + b"?"


@pytest.mark.parametrize(
    ("spoil", "reason"), [(_cut, "truncated"), (_damage, "MD5"), (_not_found, "404"), (_stall, "timed out")]
)
def test_failed_download_says_why_and_leaves_nothing(
    spoil: Callable[[ImageServer], None],
    reason: str,
    tiny_cifar10: TinyCifar10,
    server: ImageServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cifar10, "STALL_SECONDS", 0.3)
    spoil(server)
    with pytest.raises(DownloadError, match=reason) as raised:
        read_cifar10(tmp_path, ["train"])
    assert str(tmp_path) in str(raised.value)
    assert "Put cifar-10-python.tar.gz into" in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    assert socket.getdefaulttimeout() is None


def test_no_network(tiny_cifar10: TinyCifar10, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="refused"):
        read_cifar10(tmp_path, ["train"])


def test_interrupted_download_leaves_nothing(
    tiny_cifar10: TinyCifar10, server: ImageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(torchvision.datasets.utils._ARCHIVE_EXTRACTORS, ".tar", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read_cifar10(tmp_path, ["train"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_bytes", [0, 1000])
def test_truncated_archive_is_reported_and_kept(
    num_bytes: int, tiny_cifar10: TinyCifar10, server: ImageServer, tmp_path: Path
) -> None:
    archive = tiny_cifar10.write_archive(tmp_path, num_bytes)
    with pytest.raises(UsageError, match=rf"{archive} is truncated or damaged: {num_bytes:,} bytes") as raised:
        read_cifar10(tmp_path, ["train"])
    assert not isinstance(raised.value, DownloadError)
    assert archive.stat().st_size == num_bytes
    assert server.num_requests == 0


def test_damaged_folder_names_the_files(tiny_cifar10: TinyCifar10, server: ImageServer, tmp_path: Path) -> None:
    folder = tiny_cifar10.write_folder(tmp_path)
    (folder / "data_batch_2").write_bytes(tiny_cifar10.files["data_batch_2"][:-1])
    (folder / "test_batch").unlink()
    with pytest.raises(UsageError, match="data_batch_2, test_batch missing or with a wrong MD5") as raised:
        read_cifar10(tmp_path, ["train"])
    assert not isinstance(raised.value, DownloadError)
    assert server.num_requests == 0


def test_data_dir_that_is_a_file(tiny_cifar10: TinyCifar10, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match="must be a folder"):
        read_cifar10(file, ["train"])
    with pytest.raises(UsageError, match=r"[Nn]ot a directory"):
        read_cifar10(file / "below", ["train"])
