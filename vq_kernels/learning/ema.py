"""Codes that follow the means of their rows: exponential moving averages instead of a gradient.

With n_k the number of rows that chose code k in a batch, Σx their sum, and N_k and S_k the moving averages of both,

    N_k ← λ·N_k + (1 - λ)·n_k,    S_k ← λ·S_k + (1 - λ)·Σx,    c_k = S_k / N'_k,

where N'_k is N_k smoothed, so that a code without rows causes no division by zero.

Source: van den Oord et al. 2017, arXiv:1711.00937, appendix A.1; smoothing: Razavi et al. 2019, arXiv:1906.00446.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vq_kernels.distributed import rank_and_world, sum_over_ranks
from vq_kernels.gradient.autograd import codebook_gradient_op


class RowSums(NamedTuple):
    """The number of rows that chose each code in a batch, [K], and their sum, [K, D].

    With `codes` [M] int64, the sums are [M, D], those of these codes; further entries of a code are 0.
    """

    counts: Tensor
    sums: Tensor
    codes: Tensor | None = None

    def all_sums(self) -> Tensor:
        """Returns the sums of all codes, [K, D]."""
        if self.codes is None:
            return self.sums
        return self.sums.new_zeros(len(self.counts), self.sums.shape[1]).index_add_(0, self.codes, self.sums)


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
        RowSums in float32, or float64 if an input is. If there are fewer rows than codes, only those of their codes.
    """
    at_code = codebook.index_select(0, indices)  # [M, D]
    kept = torch.where(counted[:, None], rows, at_code.to(rows.dtype))  # a row at its code adds 0
    num_rows, num_codes = len(rows), len(codebook)
    if not torch.compiler.is_compiling() and num_rows < num_codes and rank_and_world(synchronise)[1] == 1:
        places = torch.arange(num_rows, device=rows.device)
        first = places.new_full((num_codes,), num_rows).scatter_reduce_(0, indices, places, "amin")[indices]
        difference_sums, _ = codebook_gradient_op(kept, at_code, first, 1, backend)  # at the first row of each code
        num_counted = counted.to(difference_sums.dtype)
        of_first = torch.zeros_like(num_counted).index_add_(0, first, num_counted)
        counts = num_counted.new_zeros(num_codes).index_add_(0, indices, num_counted)
        return RowSums(counts, of_first[:, None] * at_code - difference_sums, indices)
    difference_sums, _ = codebook_gradient_op(kept, codebook, indices, 1, backend)  # Σ (code - row)
    counts = difference_sums.new_zeros(codebook.shape[0]).index_add_(0, indices, counted.to(difference_sums.dtype))
    packed = sum_over_ranks(torch.cat([counts[:, None], difference_sums], dim=1), synchronise)
    counts, difference_sums = packed[:, 0], packed[:, 1:]
    return RowSums(counts, counts[:, None] * codebook - difference_sums)


def move_averages_(sizes: Tensor, sums: Tensor, batch: RowSums, share: Tensor) -> None:
    """Moves the averages N [K] and S [K, D] by one batch, in place; `share` [] is 1 - λ, in their dtype."""
    sizes.lerp_(batch.counts.to(sizes.dtype), share)
    if batch.codes is None:
        sums.lerp_(batch.sums.to(sums.dtype), share)
    else:
        sums.mul_(1 - share).index_add_(0, batch.codes, share * batch.sums.to(sums.dtype))


def smoothed_sizes(sizes: Tensor, eps: float) -> Tensor:
    """Returns N' [..., K]: the sizes N with `eps` added to each, scaled to keep their total."""
    total = sizes.sum(dim=-1, keepdim=True)
    return (sizes + eps) / (total + sizes.shape[-1] * eps) * total


def mean_codes(sizes: Tensor, sums: Tensor, eps: float) -> Tensor:
    """Returns the codes S / N', [..., K, D]."""
    return sums / smoothed_sizes(sizes, eps)[..., None]
