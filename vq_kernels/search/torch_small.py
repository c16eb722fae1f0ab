"""The scan of a small search in PyTorch: one product of the rows and the codes as they are.

The nearest code of x maximises S_k = x·c_k - ½‖c_k‖². With C the longest ‖c_k‖, every float32 score is off by at most
E = f·C·(‖x‖ + C). A row is certified if one code alone reaches best - 2·E. docs/explanations/exactness.md has the
proof.

Nothing is shifted, scaled or padded with bounds, so that a few dozen operations are saved. Rows and codes far from the
origin have a large E and are left to the scan of tiles (torch_backend.py).

Code k belongs to group k // S and to slot k % S. If exactly one group and one slot reach the threshold, then one code
alone does, and the sum of their offsets is its index.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from vq_kernels.search.top2 import TILE_ELEMENTS
from vq_kernels.search.torch_bounds import error_factor, float32_is_sufficient, squared_distances

LARGEST_SCAN = TILE_ELEMENTS  # most elements of the scores, and of the rows
MOST_SORTED_ROWS = 8  # up to it, topk and Python numbers are faster than the maxima of groups and slots
_FEW_PAIRS = 64  # rows and their candidates; up to it, Python numbers are faster than a dozen operations
_SHORTEST_RADIUS, _LONGEST_RADIUS = 2.0**-40, 2.0**60


class SmallOperand(NamedTuple):
    """What the scan needs to know of a codebook."""

    sq_norms: Tensor  # [K] float32
    radius: Tensor  # [] float32, the longest norm; NaN or inf if a code is not finite

    @property
    def lowest_threshold(self) -> float:
        """Below all thresholds of rows in range."""
        return -math.inf

    def costs(self, x: Tensor, codes: Tensor) -> Tensor:
        """Return what decides between codes [P, D] for the rows x [P, D], both float64: the least of [P] wins."""
        return squared_distances(x, codes)

    def usable(self, num_codes: int) -> Tensor:
        """Return [K] bool, which codes are finite: all that are scanned."""
        return self.sq_norms.isfinite()


class Uncertified(NamedTuple):
    """What the scan knows of the M rows that it does not certify."""

    rows: Tensor  # [M] int64
    thresholds: Tensor  # [M] float32; NaN or -inf for a row out of range
    scores: Tensor  # [M, K] float32


def prepare_small(codebook: Tensor) -> SmallOperand:
    """Prepare the codebook [K, D]."""
    norms = torch.linalg.vector_norm(codebook.float(), dim=1)
    return SmallOperand(norms.square(), norms.amax())


def is_small(x: Tensor, codebook: Tensor) -> bool:
    """Whether `scan_small` is meant for x [N, D] and codebook [K, D], by their shapes, dtypes and the settings."""
    (num_rows, code_dim), num_codes = x.shape, codebook.shape[0]
    return (
        0 < num_rows * max(num_codes, code_dim) <= LARGEST_SCAN
        and num_codes > 1
        and torch.float64 not in (x.dtype, codebook.dtype)
        and float32_is_sufficient(x)
    )


def scan_small(x: Tensor, codebook: Tensor, operand: SmallOperand) -> tuple[Tensor, Uncertified | None] | None:
    """Scan x [N, D].

    Returns:
        indices [N] int64, undefined for uncertified rows; and what is known of these, or None if all are certified.
        Or None if the codebook [K, D] is out of range, or has codes that are not finite.
    """
    radius = float(operand.radius)
    if not _SHORTEST_RADIUS <= radius <= _LONGEST_RADIUS:
        return None
    x, codebook = x.float(), codebook.float()
    norms = torch.linalg.vector_norm(x, dim=1)
    scan = _scan_by_sorting if x.shape[0] <= MOST_SORTED_ROWS else _scan_by_maxima
    return scan(x, codebook, operand.sq_norms, norms, radius, error_factor(x.shape[1], torch.float32))


def _scan_by_maxima(
    x: Tensor, codebook: Tensor, sq_norms: Tensor, norms: Tensor, radius: float, factor: float
) -> tuple[Tensor, Uncertified | None]:
    num_rows, num_codes = x.shape[0], codebook.shape[0]
    slots = 1 << (num_codes - 1).bit_length() // 2
    groups = -(-num_codes // slots)
    padded = x.new_empty(groups * slots, num_rows)
    scores = padded[:num_codes]
    torch.mm(codebook, x.t(), out=scores).sub_(sq_norms[:, None], alpha=0.5)
    if groups * slots > num_codes:
        padded[num_codes:] = -torch.inf
    maxima = x.new_empty(slots + groups, num_rows)
    by_slot = maxima[:slots]
    torch.amax(padded.view(groups, slots, num_rows), dim=0, out=by_slot)
    torch.amax(padded.view(groups, slots, num_rows), dim=1, out=maxima[slots:])
    # 4·C·(‖x‖ + C) first: it is inf if a score might overflow, and so is the error.
    errors = norms.add_(radius).mul_(4 * radius)
    thresholds = torch.sub(by_slot.amax(dim=0), errors, alpha=factor / 2)
    maxima.ge_(thresholds)  # 1 or 0; NaN reaches nothing
    counts, indices = torch.mm(_offsets(slots, groups, x.device), maxima)
    rows = counts.ne_(2).nonzero()[:, 0]
    if not rows.numel():
        return indices.long(), None
    return indices.long(), Uncertified(rows, thresholds.index_select(0, rows), scores.index_select(1, rows).t())


def _scan_by_sorting(
    x: Tensor, codebook: Tensor, sq_norms: Tensor, norms: Tensor, radius: float, factor: float
) -> tuple[Tensor, Uncertified | None]:
    scores = torch.addmm(sq_norms, x, codebook.t(), beta=-0.5)  # [N, K]
    top2, indices = scores.topk(2, dim=1)
    rows, thresholds = [], []
    for row, ((best, second), norm) in enumerate(zip(top2.tolist(), norms.tolist(), strict=True)):
        error = factor * radius * (norm + radius)
        threshold = best - 2 * error if (norm + radius) * radius < 2.0**120 else math.nan
        if not second < threshold:  # not >=: NaN certifies nothing
            rows.append(row)
            thresholds.append(threshold)
    indices = indices[:, 0].contiguous()
    return indices, Uncertified(indices.new_tensor(rows), x.new_tensor(thresholds), scores[rows]) if rows else None


def rerank_few(x: Tensor, codebook: Tensor, rest: Uncertified) -> Tensor | None:
    """Compare the candidates of the uncertified rows x [M, D] in float64, by a handful of operations.

    Return the indices [M] of the nearest codes, the lowest on a tie; or None if there are many candidates, or a row out
    of range.
    """
    if x.shape[0] > _FEW_PAIRS // 2 or not all(threshold > -math.inf for threshold in rest.thresholds.tolist()):
        return None
    row, code = (rest.scores >= rest.thresholds[:, None]).nonzero(as_tuple=True)
    if row.shape[0] > _FEW_PAIRS:
        return None
    distances = squared_distances(x.index_select(0, row).double(), codebook.index_select(0, code).double())
    pairs = sorted(zip(distances.tolist(), row.tolist(), code.tolist(), strict=True), reverse=True)
    nearest = {row: code for _, row, code in pairs}  # the last of each row: the least distance, then the lowest code
    return code.new_tensor([nearest[row] for row in range(x.shape[0])])


@functools.lru_cache(maxsize=64)
def _offsets(slots: int, groups: int, device: torch.device) -> Tensor:
    """[2, slots + groups] float32: ones, which count; and what each slot and each group adds to the index."""
    with torch.inference_mode(False):
        offsets = torch.ones(2, slots + groups, dtype=torch.float32, device=device)
        torch.arange(slots, dtype=torch.float32, device=device, out=offsets[1, :slots])
        offsets[1, slots:] = slots * torch.arange(groups, dtype=torch.float32, device=device)
    return offsets
