"""Finds the top two scores of each row without tracking indices.

Code k belongs to group k // S, and to slot k % S of its half of the groups. Two vectorised reductions of the scores
give the maximum of each group and of each slot. The top score is the largest of either; its code is in that group and
that slot. Every other code is in another group or in another slot, so the runner-up is the second largest group maximum
or the second largest slot maximum, whichever is larger. If several codes share the top score, the runner-up equals it.
The code found may then be none of them, but its index is at most their highest.

The groups are divided into halves because the two threads of a product write half of the codes each. No reduction then
reads from the cache of another thread's core, which would slow the next product down to half its speed.
"""

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 20  # scores held at a time; 4 MiB of float32 fit into a core's caches
_PART_ELEMENTS = 1 << 20  # elements of the rows, or of their maxima, processed at a time
_BLOCK_K = 1 << 12  # most codes per tile; larger codebooks are processed in blocks


def num_slots(num_codes: int) -> int:
    """S, a power of two of at least 16, for about as many groups as slots in both halves."""
    return 1 << max(4, ((num_codes - 1).bit_length() - 1) // 2)


def padded(num_codes: int) -> int:
    """num_codes rounded up to two halves of whole groups."""
    unit = 2 * num_slots(num_codes)
    return -(-num_codes // unit) * unit


class Top2:
    """The two largest elements of each of num_rows rows of rows @ matrix.T, with matrix [K, W] and K `padded`.

    Call `reduce` with part_rows rows at a time, and `result` after at most chunk_rows rows.
    """

    def __init__(self, matrix: Tensor, num_rows: int) -> None:
        num_codes, width = matrix.shape
        slots = num_slots(num_codes)
        self.matrix, self.slots = matrix, slots
        self.block_k = min(num_codes, max(_BLOCK_K, slots))
        tile_rows = max(1, min(TILE_ELEMENTS // self.block_k, _PART_ELEMENTS // width))
        self.tile_rows = max(1, min(num_rows, 1 << tile_rows.bit_length() - 1))  # a power of two: faster products
        num_maxima = 2 * slots + num_codes // slots
        self.part_rows = self.tile_rows * max(1, _PART_ELEMENTS // (self.tile_rows * max(width, num_maxima)))
        self.chunk_rows = self.part_rows * max(1, _PART_ELEMENTS // (self.part_rows * num_maxima))
        self.scores = matrix.new_empty(self.block_k * self.tile_rows)
        self.slot_maxima = matrix.new_empty(2 * slots, min(self.chunk_rows, num_rows))
        self.group_maxima = matrix.new_empty(num_codes // slots, min(self.chunk_rows, num_rows))

    def reduce(self, rows: Tensor, first_row: int) -> None:
        """Add rows [N, W] as rows first_row, first_row + 1, ... of the next result."""
        for start in range(0, rows.shape[0], self.tile_rows):
            tile = rows[start : start + self.tile_rows]
            place = slice(first_row + start, first_row + start + tile.shape[0])
            self._reduce_tile(tile, self.slot_maxima[:, place], self.group_maxima[:, place])

    def _reduce_tile(self, rows: Tensor, slot_maxima: Tensor, group_maxima: Tensor) -> None:
        num_rows, slots = rows.shape[0], self.slots
        by_half = slot_maxima.view(2, slots, num_rows)
        for first_code in range(0, self.matrix.shape[0], self.block_k):
            block = self.matrix[first_code : first_code + self.block_k]
            scores = self.scores[: block.shape[0] * num_rows].view(block.shape[0], num_rows)
            torch.mm(block, rows.t(), out=scores)
            first_group, num_groups = first_code // slots, block.shape[0] // slots
            groups = group_maxima[first_group : first_group + num_groups]
            torch.amax(scores.view(num_groups, slots, num_rows), dim=1, out=groups)
            halves = scores.view(2, num_groups // 2, slots, num_rows)
            if first_code == 0:
                torch.amax(halves, dim=1, out=by_half)
            else:
                torch.maximum(by_half, halves.amax(dim=1), out=by_half)

    def result(self, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the code with the top score [N] int64, that score [N] and the runner-up [N] of the N rows reduced."""
        slot, best, other_slot = _largest_and_next(self.slot_maxima[:, :num_rows])
        group, _, other_group = _largest_and_next(self.group_maxima[:, :num_rows])
        return group * self.slots + slot % self.slots, best, torch.maximum(other_slot, other_group)


def _largest_and_next(maxima: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The position of the first largest [N] int64, its value [N] and the next value [N] of each column of [S, N].

    Overwrites maxima. Three vectorised passes; `max`, which tracks an index, takes three times as long.
    """
    size = maxima.shape[0]
    largest = maxima.amax(dim=0)
    countdown = torch.arange(size, 0, -1, dtype=maxima.dtype, device=maxima.device)
    marks = torch.eq(maxima, largest, out=torch.empty_like(maxima)).mul_(countdown[:, None])
    place = (size - marks.amax(dim=0)).long() % size  # a column of NaN has no mark and gets 0
    maxima.scatter_(0, place[None], -torch.inf)
    return place, largest, maxima.amax(dim=0)
