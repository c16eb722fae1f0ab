"""Which data set is loaded, how it is split, and how its batches are ordered and flipped."""

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.vqae.data.conftest import ImageServer, TinyCifar10
from vqae.config import Dataset
from vqae.data import load
from vqae.data.load import evaluation_batches, load_images, load_split, split_train, to_device, training_batches
from vqae.runtime.errors import UsageError

CPU = torch.device("cpu")


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
def test_load_split_equals_load_images(dataset: Dataset, tiny_cifar10: TinyCifar10, tmp_path: Path) -> None:
    tiny_cifar10.write_folder(tmp_path)
    _image_folder(tmp_path)
    images = load_images(dataset, tmp_path, seed=1)
    for split, expected in (("train", images.train), ("test", images.test)):
        alone, actual_dataset = load_split(dataset, tmp_path, split, seed=1)
        assert torch.equal(alone, expected)
        assert actual_dataset == images.dataset


def test_auto_finds_cifar10(tiny_cifar10: TinyCifar10, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_cifar10.write_folder(tmp_path)
    assert load_images("auto", tmp_path).dataset == "cifar10"
    assert caplog.records == []


def test_auto_downloads(tiny_cifar10: TinyCifar10, server: ImageServer, tmp_path: Path) -> None:
    assert load_images("auto", tmp_path).dataset == "cifar10"


def test_auto_falls_back_with_a_warning(
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


def test_fallback_warning_without_logging_configuration(
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


# -- splits and batches


def numbered(count: int) -> Tensor:
    """Images [count, 3, 2, 2] uint8 whose left pixels hold the image's number, and the right ones 255."""
    images = torch.full((count, 3, 2, 2), 255, dtype=torch.uint8)
    images[..., 0] = torch.arange(count, dtype=torch.uint8)[:, None, None]
    return images


def numbers(images: Tensor) -> list[int]:
    """The numbers of `numbered` images, mirrored or not."""
    return images[:, 0, 0].min(dim=1).values.tolist()


def epoch(images: Tensor, *, flip: bool = False, seed: int = 0, epoch: int = 0, first_step: int = 0) -> Tensor:
    """The images of an epoch in batches of 20."""
    batches = training_batches(images, 20, CPU, flip=flip, seed=seed, epoch=epoch, first_step=first_step)
    return torch.cat(list(batches))


@pytest.mark.parametrize("val_fraction", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("limit", [None, 40])
def test_split_train_splits_all_images(limit: int | None, val_fraction: float) -> None:
    train, val = map(numbers, split_train(numbered(100), limit, val_fraction, seed=3))
    total = 100 if limit is None else limit
    assert len(val) == round(val_fraction * total)
    assert len(train) + len(val) == total == len({*train, *val})


def test_split_train_is_a_function_of_the_seed() -> None:
    images = numbered(100)
    first, again, other = (split_train(images, 40, 0.1, seed) for seed in (3, 3, 4))
    assert all(map(torch.equal, first, again))
    assert set(numbers(first[0])) != set(numbers(other[0]))


@pytest.mark.parametrize(("count", "limit", "val_fraction"), [(1, None, 0.0), (100, 1, 0.0), (3, None, 0.5)])
def test_split_train_needs_two_training_images(count: int, limit: int | None, val_fraction: float) -> None:
    with pytest.raises(UsageError, match="at least 2 images are needed to train on, got 1"):
        split_train(numbered(count), limit, val_fraction, seed=0)


def test_limit_above_the_number_of_images() -> None:
    assert split_train(numbered(5), 10, 0.0, seed=0)[0].shape[0] == 5


def test_an_epoch_shows_every_image_once() -> None:
    images = numbered(60)
    shown = epoch(images)
    assert sorted(numbers(shown)) == list(range(60))
    assert numbers(shown) != list(range(60))
    assert (shown[..., 1] == 255).all()


def test_incomplete_last_batch_is_dropped() -> None:
    images = numbered(50)
    seen = [set(numbers(epoch(images, epoch=e))) for e in range(3)]
    assert all(len(shown) == 40 for shown in seen)
    assert len(seen[0] | seen[1] | seen[2]) > 45


def test_an_epoch_is_a_function_of_seed_and_epoch() -> None:
    images = numbered(60)

    def shown(seed: int, number: int) -> Tensor:
        return epoch(images, flip=True, seed=seed, epoch=number)

    before = torch.get_rng_state()
    assert torch.equal(shown(1, 2), shown(1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert numbers(shown(1, 2)) != numbers(shown(1, 3))
    assert numbers(shown(1, 2)) != numbers(shown(2, 2))


def test_an_epoch_can_start_at_any_step() -> None:
    images = numbered(60)
    last = epoch(images, flip=True, seed=1, first_step=2)
    assert torch.equal(last, epoch(images, flip=True, seed=1)[40:])


def test_flip_flips_about_half_of_the_images() -> None:
    images = numbered(200)
    shown = epoch(images, flip=True)
    mirrored = shown[:, 0, 0, 0] == 255  # the image of number 255 is not among them
    assert 60 < mirrored.sum() < 140
    upright = torch.where(mirrored[:, None, None, None], shown.flip(3), shown)
    assert (upright[..., 1] == 255).all()
    assert sorted(numbers(shown)) == list(range(200))


def test_evaluation_batches_hold_every_image_once() -> None:
    batches = list(evaluation_batches(numbered(7), 3, CPU))
    assert [batch.shape[0] for batch in batches] == [3, 3, 1]
    assert numbers(torch.cat(batches)) == list(range(7))


def test_to_device_does_not_copy_on_the_cpu() -> None:
    images = numbered(3)
    assert to_device(images, CPU).data_ptr() == images.data_ptr()
