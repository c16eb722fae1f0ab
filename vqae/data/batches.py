"""Pictures in memory: one uint8 tensor, on the training device where it fits."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vqae.runtime.distributed import own_part
from vqae.runtime.errors import UsageError

_ROOM_NEEDED = 2.0  # free GPU memory, in units of the pictures' size, from which they live on the GPU


class Split(NamedTuple):
    """The training pictures, parted.

    Attributes:
        train: [N, 3, H, W] uint8.
        val: [M, 3, H, W] uint8, disjoint from train; M may be 0.
    """

    train: Tensor
    val: Tensor


def split_train(pictures: Tensor, limit: int | None, val_fraction: float, seed: int) -> Split:
    """Shuffle by seed, take the first `limit`, and hold out a share of them.

    Args:
        pictures: [N, 3, H, W] uint8.
        limit: how many to take; None for all.
        val_fraction: share of those that is held out, rounded to whole pictures.
        seed: of the shuffle.

    Raises:
        UsageError: fewer than 2 pictures are left to train on.
    """
    order = torch.randperm(pictures.shape[0], generator=torch.Generator().manual_seed(seed))[:limit]
    num_val = round(val_fraction * order.numel())
    if order.numel() - num_val < 2:
        raise UsageError(
            f"at least 2 pictures are needed to train on, got {order.numel() - num_val} "
            f"(of {pictures.shape[0]}, --limit {limit}, --val-fraction {val_fraction})"
        )
    return Split(pictures[order[num_val:]], pictures[order[:num_val]])


def fingerprints(*parts: Tensor) -> list[tuple[int, ...]]:
    """Of each part of the pictures, [N, 3, H, W] uint8, numbers that those of others hardly share: N first."""
    return [(*part.shape, int(part.sum())) for part in parts]


def place(pictures: Tensor, device: torch.device) -> Tensor:
    """The pictures on the device if there is room, else in pinned memory."""
    if device.type != "cuda":
        return pictures.to(device)
    free, _ = torch.cuda.mem_get_info(device)
    if pictures.nbytes * _ROOM_NEEDED <= free:
        return pictures.to(device)
    return pictures.pin_memory()


class EpochOrder:
    """The order of an epoch's pictures, and which are mirrored: a function of (seed, epoch) alone, so that a resumed
    run continues in the middle of an epoch without any state.

    Args:
        num_pictures: N.
        batch_size: at most N; an incomplete last batch is left out (every epoch leaves out others).
        flip: mirror each picture with probability 1/2.
        seed: of the run.
        epoch: from 0.
    """

    def __init__(self, num_pictures: int, batch_size: int, *, flip: bool, seed: int, epoch: int) -> None:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        self._order = torch.randperm(num_pictures, generator=generator)
        self._mirrored = torch.rand(num_pictures, generator=generator) < 0.5 if flip else None
        self._batch_size = batch_size

    def batch(self, pictures: Tensor, step: int, device: torch.device) -> Tensor:
        """This process's part of the epoch's batch number `step`, [B, 3, H, W] uint8 on the device."""
        part = _own_rows(step * self._batch_size, self._batch_size)
        chosen = pictures[self._order[part].to(pictures.device)].to(device, non_blocking=True)
        if self._mirrored is None:
            return chosen
        mirrored = self._mirrored[part].to(device)[:, None, None, None]
        return torch.where(mirrored, chosen.flip(3), chosen)


def in_order(pictures: Tensor, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """All pictures, once, in batches on the device; of each batch this process's part, which may be empty."""
    for start in range(0, pictures.shape[0], batch_size):
        rows = _own_rows(start, min(batch_size, pictures.shape[0] - start))
        yield pictures[rows].to(device, non_blocking=True)


def _own_rows(start: int, count: int) -> slice:
    """This process's part of `count` rows from `start`."""
    part = own_part(count)
    return slice(start + part.start, start + part.stop)
