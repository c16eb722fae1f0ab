"""How pictures are parted, ordered and mirrored."""

import pytest
import torch
from torch import Tensor

from vqae.data.batches import EpochOrder, in_order, place, split_train
from vqae.runtime.errors import UsageError

CPU = torch.device("cpu")


def numbered(count: int) -> Tensor:
    """Pictures [count, 3, 2, 2] uint8 whose left pixels hold the picture's number, and the right ones 255."""
    pictures = torch.full((count, 3, 2, 2), 255, dtype=torch.uint8)
    pictures[..., 0] = torch.arange(count, dtype=torch.uint8)[:, None, None]
    return pictures


def numbers(pictures: Tensor) -> list[int]:
    """The numbers of `numbered` pictures, mirrored or not."""
    return pictures[:, 0, 0].min(dim=1).values.tolist()


def epoch(order: EpochOrder, pictures: Tensor, batch_size: int) -> Tensor:
    steps = pictures.shape[0] // batch_size
    return torch.cat([order.batch(pictures, step, CPU) for step in range(steps)])


@pytest.mark.parametrize("val_fraction", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("limit", [None, 40])
def test_split_train_parts_all_pictures_that_are_asked_for(limit: int | None, val_fraction: float) -> None:
    split = split_train(numbered(100), limit, val_fraction, seed=3)
    train, val = numbers(split.train), numbers(split.val)
    total = 100 if limit is None else limit
    assert len(val) == round(val_fraction * total)
    assert len(train) + len(val) == total == len({*train, *val})


def test_split_train_is_a_function_of_the_seed() -> None:
    pictures = numbered(100)
    first, again, other = (split_train(pictures, 40, 0.1, seed) for seed in (3, 3, 4))
    assert torch.equal(first.train, again.train)
    assert torch.equal(first.val, again.val)
    assert set(numbers(first.train)) != set(numbers(other.train))


@pytest.mark.parametrize(("count", "limit", "val_fraction"), [(1, None, 0.0), (100, 1, 0.0), (3, None, 0.5)])
def test_split_train_wants_two_pictures_to_train_on(count: int, limit: int | None, val_fraction: float) -> None:
    with pytest.raises(UsageError, match="at least 2 pictures are needed to train on, got 1"):
        split_train(numbered(count), limit, val_fraction, seed=0)


def test_a_limit_beyond_the_pictures_takes_them_all() -> None:
    assert split_train(numbered(5), 10, 0.0, seed=0).train.shape[0] == 5


def test_an_epoch_shows_every_picture_once() -> None:
    pictures = numbered(60)
    order = EpochOrder(60, 20, flip=False, seed=0, epoch=0)
    shown = epoch(order, pictures, 20)
    assert sorted(numbers(shown)) == list(range(60))
    assert numbers(shown) != list(range(60))
    assert (shown[..., 1] == 255).all()


def test_an_incomplete_last_batch_is_left_out_and_another_in_every_epoch() -> None:
    pictures = numbered(50)
    seen = [set(numbers(epoch(EpochOrder(50, 20, flip=False, seed=0, epoch=e), pictures, 20))) for e in range(3)]
    assert all(len(shown) == 40 for shown in seen)
    assert len(seen[0] | seen[1] | seen[2]) > 45


def test_an_epoch_is_a_function_of_seed_and_epoch() -> None:
    pictures = numbered(60)

    def shown(seed: int, number: int) -> Tensor:
        return epoch(EpochOrder(60, 20, flip=True, seed=seed, epoch=number), pictures, 20)

    before = torch.get_rng_state()
    assert torch.equal(shown(1, 2), shown(1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert numbers(shown(1, 2)) != numbers(shown(1, 3))
    assert numbers(shown(1, 2)) != numbers(shown(2, 2))


def test_a_batch_does_not_depend_on_those_before_it() -> None:
    pictures = numbered(60)
    order = EpochOrder(60, 20, flip=True, seed=1, epoch=0)
    last = order.batch(pictures, 2, CPU)
    assert torch.equal(last, epoch(EpochOrder(60, 20, flip=True, seed=1, epoch=0), pictures, 20)[40:])


def test_flip_mirrors_about_half_of_the_pictures() -> None:
    pictures = numbered(200)
    shown = epoch(EpochOrder(200, 20, flip=True, seed=0, epoch=0), pictures, 20)
    mirrored = shown[:, 0, 0, 0] == 255  # the picture of number 255 is not among them
    assert 60 < mirrored.sum() < 140
    upright = torch.where(mirrored[:, None, None, None], shown.flip(3), shown)
    assert (upright[..., 1] == 255).all()
    assert sorted(numbers(shown)) == list(range(200))


def test_in_order_gives_every_picture_once_the_last_batch_being_smaller() -> None:
    batches = list(in_order(numbered(7), 3, CPU))
    assert [batch.shape[0] for batch in batches] == [3, 3, 1]
    assert numbers(torch.cat(batches)) == list(range(7))


def test_place_on_the_cpu_copies_nothing() -> None:
    pictures = numbered(3)
    assert place(pictures, CPU).data_ptr() == pictures.data_ptr()
