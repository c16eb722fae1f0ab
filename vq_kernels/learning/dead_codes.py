"""Samples the rows that replace dead codes, from the batch of all ranks.

`evenly_spaced_rows` gives the rows that one process with the whole batch would give. `random_rows` draws a random
permutation on each rank, as vector_quantize_pytorch does on one. Neither branches on data, so both can be compiled.
"""

import torch
import torch.distributed
from torch import Tensor

from vq_kernels.distributed import rank_and_world, sum_over_ranks
from vq_kernels.search.operators import WAITS

SPREAD_ROWS = 64
"""The rows that the spread of a batch is estimated from."""


def evenly_spaced_rows(
    rows: Tensor,
    row_mask: Tensor | None,
    slots: Tensor,
    num_slots: Tensor,
    *,
    noise: float,
    dtype: torch.dtype,
    synchronise: bool,
) -> Tensor:
    """Returns one row for each slot, evenly spaced from a random start, with noise added.

    The batch is the rows of all ranks, in rank order. Each rank contributes its own rows, so the result is the same on
    all ranks, even if their random numbers differ. If these are equal, it is the result of one process with all rows.

    Args:
        rows: [N, D], this rank's rows; N may differ between ranks.
        row_mask: [N] bool, the rows that may be taken, or None for all.
        slots: [K] int64, equal on all ranks. Slots in [0, num_slots) get distinct rows if there are enough.
        num_slots: [] int64.
        noise: standard deviation of the noise, relative to the mean absolute deviation of the batch in each dimension.
        dtype: dtype of the result.
        synchronise: whether to use the rows of all ranks of the default process group, or only those of this process.

    Returns:
        [K, D], equal on all ranks; NaN if there are no rows.
    """
    if row_mask is not None:
        rows = _repeat_masked(rows, row_mask)
    num_slots = num_slots.clamp(min=1)
    if noise:  # further slots, for the rows that give the spread
        further = torch.arange(SPREAD_ROWS, device=rows.device)
        slots, num_slots = torch.cat([slots * SPREAD_ROWS, further * num_slots]), num_slots * SPREAD_ROWS
    if rank_and_world(synchronise)[1] == 1:
        start = torch.randint(rows.shape[0], (), device=rows.device)
        drawn = rows[(start + slots * rows.shape[0] // num_slots) % rows.shape[0]].to(dtype)
        return _with_noise(drawn, torch.randn_like(drawn[:-SPREAD_ROWS]), noise) if noise else drawn
    start, first, num_rows = draw_start(rows).unbind()
    chosen = (start + slots * num_rows // num_slots) % num_rows.clamp(min=1) - first  # on this rank
    is_here = ((chosen >= 0) & (chosen < rows.shape[0]))[:, None]
    padded = rows if rows.shape[0] else rows.new_zeros(1, rows.shape[1])
    drawn = torch.where(is_here, padded[chosen.clamp(0, padded.shape[0] - 1)].to(dtype), 0)
    if noise:
        draws = torch.randn_like(drawn[:-SPREAD_ROWS]) * is_here[:-SPREAD_ROWS]
        packed = sum_over_ranks(torch.cat([drawn, draws]), synchronise)
        drawn, draws = torch.split(packed, [len(drawn), len(draws)])
        drawn = _with_noise(drawn, draws, noise)
    else:
        drawn = sum_over_ranks(drawn, synchronise)
    return drawn.masked_fill(num_rows == 0, torch.nan)


def _repeat_masked(rows: Tensor, row_mask: Tensor) -> Tensor:
    """Repeats the rows [N, D] that row_mask [N] bool keeps, in order, until there are N. NaN if it keeps none.

    Evenly spaced rows of the result are then evenly spaced rows of those kept.
    """
    kept_first = row_mask.logical_not().argsort(stable=True)
    position = torch.arange(rows.shape[0], device=rows.device) * row_mask.sum() // max(rows.shape[0], 1)
    return rows[kept_first[position]].masked_fill(~row_mask.any(), torch.nan)


def _with_noise(drawn: Tensor, draws: Tensor, noise: float) -> Tensor:
    """Returns the first rows of drawn [K + SPREAD_ROWS, D], plus normal draws [K, D] of the spread of the last ones."""
    rows, sample = torch.split(drawn, [len(draws), SPREAD_ROWS])
    sample = sample.masked_fill(~sample.isfinite(), torch.nan)
    spread = (sample - sample.nanmean(dim=0)).abs().nanmean(dim=0)  # no squares, which overflow
    return rows + noise * spread * draws


@torch.library.custom_op("vq_kernels::draw_start", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded, *WAITS))
def draw_start(rows: Tensor) -> Tensor:
    """Returns [3] int64: a random row of the batch of all ranks, the position of this rank's rows, the batch size.

    An operator, because the number of rows is read on the host, to draw the number that one process would draw.
    """
    rank, world_size = rank_and_world(synchronise=True)
    counts = torch.zeros(world_size, dtype=torch.int64, device=rows.device)
    counts[rank] = rows.shape[0]
    num_rows = sum_over_ranks(counts, synchronise=True).tolist()
    start = torch.randint(max(sum(num_rows), 1), (), device=rows.device)
    torch.distributed.broadcast(start, src=0)
    return torch.stack([start, *(start.new_tensor(value) for value in (sum(num_rows[:rank]), sum(num_rows)))])


@draw_start.register_fake
def _(rows: Tensor) -> Tensor:
    return rows.new_empty(3, dtype=torch.int64)


def random_rows(
    rows: Tensor, counted: Tensor, permutation: Tensor, slots: Tensor, *, synchronise: bool
) -> tuple[Tensor, Tensor]:
    """Returns one random row for each slot, distinct rows for distinct slots.

    Rank s mod W of W serves slot s, from a random permutation of its own rows. The ranks therefore agree without
    sharing random numbers, or rows that are not needed.

    Args:
        rows: [M, D]; M may differ between ranks.
        counted: [M] bool, the rows that may be drawn.
        permutation: [M] int64, random, of this rank.
        slots: [K] int64, >= 0, equal on all ranks.
        synchronise: as for `evenly_spaced_rows`.

    Returns:
        drawn [K, D], and found [K] bool: false if the rank that serves the slot has too few rows.
    """
    rank, world = rank_and_world(synchronise)
    position = slots // world
    if rows.shape[0]:
        num_counted = counted[permutation].cumsum(0)
        place = torch.searchsorted(num_counted, position + 1).clamp(max=rows.shape[0] - 1)
        found = (slots % world == rank) & (position < num_counted[-1])
        drawn = torch.where(found[:, None], rows[permutation[place]], 0)
    else:
        found = torch.zeros_like(slots, dtype=torch.bool)
        drawn = rows.new_zeros(slots.shape[0], rows.shape[1])
    packed = sum_over_ranks(torch.cat([found[:, None].to(rows.dtype), drawn], dim=1), synchronise)
    return packed[:, 1:], packed[:, 0] > 0


def draw_sampling(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draws the random numbers of `random_replacements`: a permutation [M] int64, and an offset [] in [0, 1)."""
    return torch.randperm(num_rows, device=device), torch.rand((), device=device)


def random_replacements(
    dead: Tensor, rows: Tensor, counted: Tensor, sampling: tuple[Tensor, Tensor], *, synchronise: bool
) -> tuple[Tensor, Tensor]:
    """Returns a random row for each dead code. If there are fewer rows than dead codes, some random ones get none.

    Args:
        dead: [K] bool, equal on all ranks.
        rows, counted, synchronise: as for `random_rows`.
        sampling: from `draw_sampling`, on each rank its own.

    Returns:
        drawn [K, D], and replaced [K] bool: the dead codes that got a row.
    """
    permutation, offset = sampling
    num_dead = dead.sum()
    offset = offset * (rank_and_world(synchronise)[0] == 0)  # all ranks use that of rank 0
    num_counted, offset = sum_over_ranks(torch.stack([counted.sum().to(offset.dtype), offset]), synchronise)
    start = torch.where(num_dead > num_counted, (offset * num_dead).long(), 0)
    slots = (dead.cumsum(0) - 1 - start) % num_dead.clamp(min=1)
    drawn, found = random_rows(rows, counted, permutation, slots, synchronise=synchronise)
    return drawn, dead & found
