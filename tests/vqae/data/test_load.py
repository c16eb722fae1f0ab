"""Which data set is read, under which name, and when synthetic images stand in."""

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.vqae.data.conftest import ImageServer, TinyCifar10
from vqae.config import Dataset
from vqae.data import load
from vqae.data.load import load_images, load_split
from vqae.runtime.errors import UsageError


@pytest.fixture(autouse=True)
def few_synthetic_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "NUM_SYNTHETIC", {"train": 6, "test": 4})


def _image_folder(data_dir: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        (data_dir / split / "cats").mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 6), (number, 0, 0)).save(data_dir / split / "cats" / f"{number}.png")


def test_synthetic_needs_no_folder() -> None:
    images = load_images("synthetic", None, seed=5)
    assert images.dataset == "synthetic"
    assert images.train.shape == (6, 3, 32, 32)
    assert images.test.shape == (4, 3, 32, 32)
    assert load_images("synthetic", None, image_size=48).test.shape == (4, 3, 48, 48)


def test_cifar10(tiny_cifar10: TinyCifar10, tmp_path: Path) -> None:
    tiny_cifar10.write_folder(tmp_path)
    images = load_images("cifar10", tmp_path)
    assert images.dataset == "cifar10"
    assert torch.equal(images.train, torch.from_numpy(tiny_cifar10.train))
    assert torch.equal(images.test, torch.from_numpy(tiny_cifar10.test))


def test_cifar10_at_another_size(tiny_cifar10: TinyCifar10, tmp_path: Path) -> None:
    tiny_cifar10.write_folder(tmp_path)
    images = load_images("cifar10", tmp_path, image_size=16)
    assert images.train.shape == (50, 3, 16, 16)
    assert images.train.dtype == torch.uint8
    means = torch.from_numpy(tiny_cifar10.train).float().mean((2, 3))
    assert (images.train.float().mean((2, 3)) - means).abs().max() < 4


def test_default_folder_is_data(tiny_cifar10: TinyCifar10, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_cifar10.write_folder(tmp_path / "data")
    assert load_images("cifar10", None).dataset == "cifar10"


def test_imagefolder(tmp_path: Path) -> None:
    _image_folder(tmp_path)
    images = load_images("imagefolder", tmp_path)
    assert images.dataset == "imagefolder"
    assert images.train[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert load_images("imagefolder", tmp_path, image_size=5).test.shape == (2, 3, 5, 5)


def test_imagefolder_needs_a_folder() -> None:
    with pytest.raises(UsageError, match="needs --data-dir DIR"):
        load_images("imagefolder", None)


@pytest.mark.parametrize("dataset", ["auto", "cifar10", "imagefolder", "synthetic"])
def test_a_split_alone_is_that_of_both(dataset: Dataset, tiny_cifar10: TinyCifar10, tmp_path: Path) -> None:
    tiny_cifar10.write_folder(tmp_path)
    _image_folder(tmp_path)
    images = load_images(dataset, tmp_path, seed=1)
    for split, expected in (("train", images.train), ("test", images.test)):
        alone, actual_dataset = load_split(dataset, tmp_path, split, seed=1)
        assert torch.equal(alone, expected)
        assert actual_dataset == images.dataset


def test_auto_is_cifar10_where_it_is_there(
    tiny_cifar10: TinyCifar10, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_cifar10.write_folder(tmp_path)
    assert load_images("auto", tmp_path).dataset == "cifar10"
    assert caplog.records == []


def test_auto_downloads(tiny_cifar10: TinyCifar10, server: ImageServer, tmp_path: Path) -> None:
    assert load_images("auto", tmp_path).dataset == "cifar10"


def test_auto_falls_back_aloud(
    tiny_cifar10: TinyCifar10, server: ImageServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.status = 503
    images = load_images("auto", tmp_path, seed=2)
    assert images.dataset == "synthetic"
    assert torch.equal(images.train, load_images("synthetic", None, seed=2).train)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert "THE IMAGES ARE SYNTHETIC" in message
    assert "503" in message
    assert "Put cifar-10-python.tar.gz into" in " ".join(message.split())
    assert len(message.splitlines()) > 5


def test_fallback_is_seen_without_any_logging_set_up(
    tiny_cifar10: TinyCifar10, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    load_split("auto", tmp_path, "test")
    assert "THE IMAGES ARE SYNTHETIC" in capsys.readouterr().err


def test_cifar10_never_falls_back(tiny_cifar10: TinyCifar10, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be downloaded"):
        load_images("cifar10", tmp_path)


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
def test_damaged_cifar10_is_an_error_even_for_auto(
    dataset: Dataset, tiny_cifar10: TinyCifar10, server: ImageServer, tmp_path: Path
) -> None:
    tiny_cifar10.write_archive(tmp_path, num_bytes=100)
    with pytest.raises(UsageError, match="truncated or damaged"):
        load_images(dataset, tmp_path)


def test_values_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--image-size must be at least 1, got 0"):
        load_images("synthetic", None, image_size=0)
    with pytest.raises(UsageError, match=r"--dataset must be .*, got mnist"):
        load_images("mnist", tmp_path)  # type: ignore[arg-type]
