"""k-means on the first batch, as one operator: in a captured graph it is a node, not a loop."""

from typing import Any, cast

import torch
from torch import Tensor

from vq_kernels.cosine import most_similar_code, unit
from vq_kernels.learning.dead_codes import random_rows
from vq_kernels.learning.ema import row_sums
from vq_kernels.search import nearest_code
from vq_kernels.search.backend import Backend


@torch.library.custom_op("vq_kernels::kmeans_if_needed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def kmeans_if_needed(
    needed: Tensor,
    rows: Tensor,
    counted: Tensor,
    num_codes: int,
    num_iterations: int,
    cosine: bool,
    synchronise: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs Lloyd's algorithm from random rows, if it is needed and there are rows.

    Args:
        needed: [] bool, equal on all ranks. Reading it waits for the device.
        rows: [M, D], float32 or float64; unit vectors if `cosine`.
        counted: [M] bool, the rows to use. Rows with NaN or Inf are never used.
        num_codes: K. If there are fewer rows, they are repeated.
        num_iterations: >= 1.
        cosine: assign by the dot product, and normalise the means.
        synchronise: as for `row_sums`.
        backend: as for `nearest_code`.

    Returns:
        means [K, D] and counts [K] of the last iteration, in the dtype of rows; done [] bool. If it is false, nothing
        was done and the other two are 0.
    """
    nothing = rows.new_zeros(num_codes, rows.shape[1]), rows.new_zeros(num_codes), torch.zeros_like(needed)
    if not needed:
        return nothing
    counted = counted & rows.isfinite().all(dim=1)
    slots = torch.arange(num_codes, device=rows.device)
    permutation = torch.randperm(rows.shape[0], device=rows.device)
    means, found = random_rows(rows, counted, permutation, slots, synchronise=synchronise)
    if not found.any():
        return nothing
    distinct = means[found]
    means[~found] = distinct[slots[: num_codes - distinct.shape[0]] % distinct.shape[0]]

    counts = nothing[1]
    for _ in range(num_iterations):
        search = most_similar_code if cosine else nearest_code  # an operator's schema has no Literal
        indices = search(rows, means, backend=cast(Backend, backend)).indices
        counts, sums = row_sums(rows, means, indices, counted, synchronise=synchronise, backend=backend)
        moved = sums / counts.clamp(min=1)[:, None]
        means = torch.where((counts > 0)[:, None], unit(moved) if cosine else moved, means)
    return means, counts, torch.ones_like(needed)


@kmeans_if_needed.register_fake
def _(needed: Tensor, rows: Tensor, counted: Tensor, num_codes: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return rows.new_empty(num_codes, rows.shape[1]), rows.new_empty(num_codes), torch.empty_like(needed)
