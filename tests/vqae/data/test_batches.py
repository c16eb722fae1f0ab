"""How images are parted, ordered and mirrored."""

import pytest
import torch
from torch import Tensor

from vqae.data.load import evaluation_batches, split_train, to_device, training_batches
from vqae.runtime.errors import UsageError

CPU = torch.device("cpu")


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
def test_split_train_parts_all_images_that_are_asked_for(limit: int | None, val_fraction: float) -> None:
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
def test_split_train_wants_two_images_to_train_on(count: int, limit: int | None, val_fraction: float) -> None:
    with pytest.raises(UsageError, match="at least 2 images are needed to train on, got 1"):
        split_train(numbered(count), limit, val_fraction, seed=0)


def test_a_limit_beyond_the_images_takes_them_all() -> None:
    assert split_train(numbered(5), 10, 0.0, seed=0)[0].shape[0] == 5


def test_an_epoch_shows_every_image_once() -> None:
    images = numbered(60)
    shown = epoch(images)
    assert sorted(numbers(shown)) == list(range(60))
    assert numbers(shown) != list(range(60))
    assert (shown[..., 1] == 255).all()


def test_an_incomplete_last_batch_is_left_out_and_another_in_every_epoch() -> None:
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


def test_a_batch_does_not_depend_on_those_before_it() -> None:
    images = numbered(60)
    last = epoch(images, flip=True, seed=1, first_step=2)
    assert torch.equal(last, epoch(images, flip=True, seed=1)[40:])


def test_flip_mirrors_about_half_of_the_images() -> None:
    images = numbered(200)
    shown = epoch(images, flip=True)
    mirrored = shown[:, 0, 0, 0] == 255  # the image of number 255 is not among them
    assert 60 < mirrored.sum() < 140
    upright = torch.where(mirrored[:, None, None, None], shown.flip(3), shown)
    assert (upright[..., 1] == 255).all()
    assert sorted(numbers(shown)) == list(range(200))


def test_in_order_gives_every_image_once_the_last_batch_being_smaller() -> None:
    batches = list(evaluation_batches(numbered(7), 3, CPU))
    assert [batch.shape[0] for batch in batches] == [3, 3, 1]
    assert numbers(torch.cat(batches)) == list(range(7))


def test_place_on_the_cpu_copies_nothing() -> None:
    images = numbered(3)
    assert to_device(images, CPU).data_ptr() == images.data_ptr()
