"""Where codes begin anew: at rows spread evenly over the batch, the batch of all ranks where there are several."""

from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor

from vq_kernels.distributed import rank_and_world, sum_over_ranks


def spread_rows(
    x: Tensor, slots: Tensor, num_slots: Tensor, *, noise: float, dtype: torch.dtype, synchronise: bool
) -> Tensor:
    """A row of the batch for each slot, evenly spaced from a random start, with noise.

    The batch is all ranks' rows, in the order of the ranks. Each rank answers for its own rows, so that the result is
    the same on all of them, whatever they draw; where they draw the same random numbers it is that of one process with
    all rows. Written without a branch on data, for compiled graphs.

    Args:
        x: [N, D], this rank's rows; N may differ from rank to rank.
        slots: [K] int64, the same on all ranks; those in [0, num_slots) get distinct rows, if there are as many.
        num_slots: [] int64.
        noise: standard deviation added, relative to the row's root mean square.
        dtype: of the result.
        synchronise: over the ranks of the default process group, where there is one; else this process alone.

    Returns:
        [K, D], the same on all ranks; NaN where there are no rows at all.
    """
    if rank_and_world(synchronise)[1] == 1:
        start = torch.randint(x.shape[0], (), device=x.device)
        return _with_noise(x[(start + slots * x.shape[0] // num_slots.clamp(min=1)) % x.shape[0]].to(dtype), noise)
    start, first, num_rows = draw_start(x).unbind()
    rows = (start + slots * num_rows // num_slots.clamp(min=1)) % num_rows.clamp(min=1) - first  # of this rank's
    here = (rows >= 0) & (rows < x.shape[0])
    padded = x if x.shape[0] else x.new_zeros(1, x.shape[1])
    targets = _with_noise(padded[rows.clamp(0, padded.shape[0] - 1)].to(dtype), noise)
    targets = sum_over_ranks(torch.where(here[:, None], targets, 0), synchronise)
    return targets.masked_fill(num_rows == 0, torch.nan)


def _with_noise(rows: Tensor, noise: float) -> Tensor:
    spread = noise * rows.square().mean(dim=1, keepdim=True).sqrt()
    return rows + spread * torch.randn_like(rows)


@torch.library.custom_op("vq_kernels::draw_start", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw_start(x: Tensor) -> Tensor:
    """A random row of the batch of all ranks, where this rank's rows [N, D] begin in it, and its size: [3] int64.

    An operator, so that a captured graph holds a node: how many rows the ranks have is read on the host, to draw what
    one process would draw.
    """
    rank, world_size = rank_and_world(synchronise=True)
    counts = torch.zeros(world_size, dtype=torch.int64, device=x.device)
    counts[rank] = x.shape[0]
    num_rows = sum_over_ranks(counts, synchronise=True).tolist()
    start = torch.randint(max(sum(num_rows), 1), (), device=x.device)
    torch.distributed.broadcast(start, src=0)
    return torch.stack([start, *(start.new_tensor(value) for value in (sum(num_rows[:rank]), sum(num_rows)))])


@draw_start.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(3, dtype=torch.int64)


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
