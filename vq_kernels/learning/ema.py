"""A codebook that follows the means of its rows: exponential moving averages in place of a gradient.

With n_k the rows that chose code k in a batch and Σx their sum, N_k and S_k their moving averages,

    N_k ← λ·N_k + (1 - λ)·n_k,    S_k ← λ·S_k + (1 - λ)·Σx,    c_k = S_k / N'_k,

where N'_k is N_k smoothed, so that a code without rows does not divide by zero.

Source: van den Oord et al. 2017, arXiv:1711.00937, appendix A.1; the smoothing: Razavi et al. 2019, arXiv:1906.00446.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vq_kernels.distributed import sum_over_ranks
from vq_kernels.gradient import codebook_gradient_op


class RowSums(NamedTuple):
    """What one batch says about each code: how many rows chose it, [K], and their sum, [K, D], in float32."""

    counts: Tensor
    sums: Tensor


def row_sums(
    rows: Tensor, codebook: Tensor, indices: Tensor, counted: Tensor, *, synchronise: bool, backend: str = "auto"
) -> RowSums:
    """Each code's rows, counted and summed, over all ranks.

    The differences to the code are summed and its own part is added in the end: the sum of many rows near a code is
    as good as the code itself. A row that does not count may hold anything, NaN included.

    Args:
        rows: [M, D], float32 or float64.
        codebook: [K, D], the one that was searched; the same on every rank.
        indices: [M] int64, the code that each row chose.
        counted: [M] bool, which rows count.
        synchronise: over all ranks of the default process group, where there is one; else this process alone.
        backend: as for `nearest_code`.
    """
    at_code = codebook.index_select(0, indices).to(rows.dtype)  # [M, D]; differs from the code by nothing
    kept = torch.where(counted[:, None], rows, at_code)
    difference_sums, _ = codebook_gradient_op(kept, codebook, indices, backend)  # Σ (code - row)
    counts = difference_sums.new_zeros(codebook.shape[0]).index_add_(0, indices, counted.to(difference_sums.dtype))
    packed = sum_over_ranks(torch.cat([counts[:, None], difference_sums], dim=1), synchronise)
    counts, difference_sums = packed[:, 0], packed[:, 1:]
    return RowSums(counts, counts[:, None] * codebook - difference_sums)


def move_averages_(cluster_size: Tensor, embed_avg: Tensor, batch: RowSums, decay: float) -> None:
    """Move the averages N [K] and S [K, D] by one batch, in place; `decay` is λ."""
    cluster_size.lerp_(batch.counts.to(cluster_size.dtype), 1 - decay)
    embed_avg.lerp_(batch.sums.to(embed_avg.dtype), 1 - decay)


def smoothed_sizes(cluster_size: Tensor, eps: float) -> Tensor:
    """N' [..., K]: the sizes N with `eps` added to each, scaled so that their sum stays."""
    total = cluster_size.sum(dim=-1, keepdim=True)
    return (cluster_size + eps) / (total + cluster_size.shape[-1] * eps) * total


def mean_codes(cluster_size: Tensor, embed_avg: Tensor, eps: float) -> Tensor:
    """The codes S / N', [..., K, D]."""
    return embed_avg / smoothed_sizes(cluster_size, eps)[..., None]
