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


class SmallScan(NamedTuple):
    """What the scan finds."""

    indices: Tensor  # [N] int64, undefined for uncertified rows
    uncertified: Tensor  # [M] int64, rows
    thresholds: Tensor  # [N] float32; NaN or -inf for a row out of range
    scores: Tensor  # [K, N] float32


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


def scan_small(x: Tensor, codebook: Tensor, operand: SmallOperand) -> SmallScan | None:
    """Scan x [N, D]. Return None if the codebook [K, D] is out of range, or has codes that are not finite."""
    radius = float(operand.radius)
    if not _SHORTEST_RADIUS <= radius <= _LONGEST_RADIUS:
        return None
    x, codebook = x.float(), codebook.float()
    norms = torch.linalg.vector_norm(x, dim=1)
    scan = _scan_by_sorting if x.shape[0] <= MOST_SORTED_ROWS else _scan_by_maxima
    return scan(x, codebook, operand.sq_norms, norms, radius, error_factor(x.shape[1], torch.float32))


def _scan_by_maxima(
    x: Tensor, codebook: Tensor, sq_norms: Tensor, norms: Tensor, radius: float, factor: float
) -> SmallScan:
    num_rows, num_codes = x.shape[0], codebook.shape[0]
    slots = 1 << (num_codes - 1).bit_length() // 2
    groups = -(-num_codes // slots)
    padded = x.new_empty(groups * slots, num_rows)
    scores = padded[:num_codes]
    torch.mm(codebook, x.t(), out=scores).sub_(sq_norms[:, None], alpha=0.5)
    padded[num_codes:] = -torch.inf
    by_slot = padded.view(groups, slots, num_rows)
    maxima = x.new_empty(slots + groups, num_rows)
    torch.amax(by_slot, dim=0, out=maxima[:slots])
    torch.amax(by_slot, dim=1, out=maxima[slots:])
    # 4·C·(‖x‖ + C) first: it is inf if a score might overflow, and so is the error.
    errors = norms.add_(radius).mul_(4 * radius)
    thresholds = torch.sub(maxima[:slots].amax(dim=0), errors, alpha=factor / 2)
    reaching = maxima.ge_(thresholds)  # 1 or 0; NaN reaches nothing
    counts, indices = torch.mm(_offsets(slots, groups, x.device), reaching)
    return SmallScan(indices.long(), (counts != 2).nonzero()[:, 0], thresholds, scores)


def _scan_by_sorting(
    x: Tensor, codebook: Tensor, sq_norms: Tensor, norms: Tensor, radius: float, factor: float
) -> SmallScan:
    scores = torch.addmm(sq_norms, x, codebook.t(), beta=-0.5)  # [N, K]
    top2, indices = scores.topk(2, dim=1)
    thresholds, uncertified = [], []
    for row, ((best, second), norm) in enumerate(zip(top2.tolist(), norms.tolist(), strict=True)):
        error = factor * radius * (norm + radius)
        thresholds.append(best - 2 * error if (norm + radius) * radius < 2.0**120 else math.nan)
        if not second < thresholds[row]:  # not >=: NaN certifies nothing
            uncertified.append(row)
    return SmallScan(
        indices[:, 0].contiguous(), x.new_tensor(uncertified, dtype=torch.int64), x.new_tensor(thresholds), scores.t()
    )


@functools.lru_cache(maxsize=64)
def _offsets(slots: int, groups: int, device: torch.device) -> Tensor:
    """[2, slots + groups] float32: ones, which count; and what each slot and each group adds to the index."""
    with torch.inference_mode(False):
        offsets = torch.ones(2, slots + groups, dtype=torch.float32, device=device)
        torch.arange(slots, dtype=torch.float32, device=device, out=offsets[1, :slots])
        offsets[1, slots:] = slots * torch.arange(groups, dtype=torch.float32, device=device)
    return offsets
