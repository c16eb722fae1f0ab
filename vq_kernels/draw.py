"""Rows drawn at random to be codes, the same on every rank."""

from typing import NamedTuple

import torch
from torch import Tensor

from vq_kernels.ranks import rank_and_world, sum_over_ranks


def draw_rows(
    rows: Tensor, counted: Tensor, order: Tensor, slots: Tensor, *, synchronise: bool
) -> tuple[Tensor, Tensor]:
    """A random row for each slot, distinct ones for distinct slots; written without a branch on data.

    Slot s is served by rank s mod W of W, from a random order of its own rows: what is drawn agrees on all ranks
    without sharing a random number, or a row that is not needed.

    Args:
        rows: [M, D]; M may differ from rank to rank.
        counted: [M] bool, which rows may be drawn.
        order: [M] int64, a random permutation; this rank's own.
        slots: [K] int64, >= 0, the same on all ranks.
        synchronise: as for `row_sums`.

    Returns:
        drawn [K, D], and found [K] bool: false where the rank that serves the slot has not so many rows.
    """
    rank, world = rank_and_world(synchronise)
    position = slots // world
    if rows.shape[0]:
        rank_of_row = counted[order].cumsum(0)  # 1 for the first that counts
        place = torch.searchsorted(rank_of_row, position + 1).clamp(max=rows.shape[0] - 1)
        found = (slots % world == rank) & (position < rank_of_row[-1])
        drawn = torch.where(found[:, None], rows[order[place]], 0)
    else:
        found = torch.zeros_like(slots, dtype=torch.bool)
        drawn = rows.new_zeros(slots.shape[0], rows.shape[1])
    packed = sum_over_ranks(torch.cat([found[:, None].to(rows.dtype), drawn], dim=1), synchronise)
    return packed[:, 1:], packed[:, 0] > 0


class Lots(NamedTuple):
    """The random numbers of `draw_replacements`: an order of the rows, [M] int64, and a number in [0, 1), []."""

    order: Tensor
    first: Tensor


def draw_lots(num_rows: int, device: torch.device) -> Lots:
    """Draw them for M rows; on each rank by itself."""
    return Lots(torch.randperm(num_rows, device=device), torch.rand((), device=device))


def draw_replacements(
    dead: Tensor, rows: Tensor, counted: Tensor, lots: Lots, *, synchronise: bool
) -> tuple[Tensor, Tensor]:
    """A random row for each dead code. Where there are fewer rows than dead codes, some of these have to wait.

    Args:
        dead: [K] bool, the same on all ranks.
        rows, counted, synchronise: as for `draw_rows`.
        lots: of `draw_lots`; this rank's own.

    Returns:
        drawn [K, D], and replaced [K] bool: the dead codes that got a row.
    """
    num_dead = dead.sum()
    first = lots.first * (rank_and_world(synchronise)[0] == 0)  # rank 0 decides who waits
    num_counted, first = sum_over_ranks(torch.stack([counted.sum().to(first.dtype), first]), synchronise)
    start = torch.where(num_dead > num_counted, (first * num_dead).long(), 0)
    slots = (dead.cumsum(0) - 1 - start) % num_dead.clamp(min=1)
    drawn, found = draw_rows(rows, counted, lots.order, slots, synchronise=synchronise)
    return drawn, dead & found
