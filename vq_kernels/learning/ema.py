"""Codes that follow the means of their rows: exponential moving averages instead of a gradient.

With n_k the number of rows that chose code k in a batch, Σx their sum, and N_k and S_k the moving averages of both,

    N_k ← λ·N_k + (1 - λ)·n_k,    S_k ← λ·S_k + (1 - λ)·Σx,    c_k = S_k / N'_k,

where N'_k is N_k smoothed, so that a code without rows causes no division by zero.

Source: van den Oord et al. 2017, arXiv:1711.00937, appendix A.1; smoothing: Razavi et al. 2019, arXiv:1906.00446.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vq_kernels.distributed import sum_over_ranks
from vq_kernels.gradient.autograd import codebook_gradient_op


class RowSums(NamedTuple):
    """The number of rows that chose each code in a batch, [K], and their sum, [K, D]."""

    counts: Tensor
    sums: Tensor


def row_sums(
    rows: Tensor, codebook: Tensor, indices: Tensor, counted: Tensor, *, synchronise: bool, backend: str = "auto"
) -> RowSums:
    """Counts and sums the rows of each code, over all ranks.

    It sums the differences to the code and adds the code at the end, so the sum of many rows near a code has the
    relative precision of the code.

    Args:
        rows: [M, D], float32 or float64.
        codebook: [K, D], the codes that were searched, equal on every rank.
        indices: [M] int64, the code of each row.
        counted: [M] bool, the rows to count. The others may hold NaN.
        synchronise: whether to sum over all ranks of the default process group, or to use only the rows of this
            process.
        backend: as for `nearest_code`.

    Returns:
        RowSums in float32, or float64 if an input is.
    """
    at_code = codebook.index_select(0, indices).to(rows.dtype)  # [M, D]
    kept = torch.where(counted[:, None], rows, at_code)  # a row at its code adds 0
    difference_sums, _ = codebook_gradient_op(kept, codebook, indices, 1, backend)  # Σ (code - row)
    counts = difference_sums.new_zeros(codebook.shape[0]).index_add_(0, indices, counted.to(difference_sums.dtype))
    packed = sum_over_ranks(torch.cat([counts[:, None], difference_sums], dim=1), synchronise)
    counts, difference_sums = packed[:, 0], packed[:, 1:]
    return RowSums(counts, counts[:, None] * codebook - difference_sums)


def move_averages_(sizes: Tensor, sums: Tensor, batch: RowSums, share: Tensor) -> None:
    """Moves the averages N [P, K] and S [P, K, D] by one batch, in place; `share` [P] is 1 - λ."""
    sizes.lerp_(batch.counts.to(sizes.dtype), share[:, None].to(sizes.dtype))
    sums.lerp_(batch.sums.to(sums.dtype), share[:, None, None].to(sums.dtype))


def smoothed_sizes(sizes: Tensor, eps: float) -> Tensor:
    """Returns N' [..., K]: the sizes N with `eps` added to each, scaled to keep their total."""
    total = sizes.sum(dim=-1, keepdim=True)
    return (sizes + eps) / (total + sizes.shape[-1] * eps) * total


def mean_codes(sizes: Tensor, sums: Tensor, eps: float) -> Tensor:
    """Returns the codes S / N', [..., K, D]."""
    return sums / smoothed_sizes(sizes, eps)[..., None]
