"""What `VectorQuantize` adds to the loss of the model around it."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vq_kernels.cross_entropy import Metric, code_cross_entropy


class LossBreakdown(NamedTuple):
    """The parts of the loss, [] each, before their weights; all but the first are 0 here."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


def commitment_loss(rows: Tensor, codes: Tensor, row_mask: Tensor | None) -> Tensor:
    """The mean of (row - code)², [], over all numbers of rows [C, M, D] that row_mask [M] lets count; 0 for none."""
    if row_mask is None:
        return F.mse_loss(rows, codes, reduction="sum") / max(rows.numel(), 1)
    squares = F.mse_loss(rows, codes, reduction="none")
    num_numbers = row_mask.sum() * rows.shape[0] * rows.shape[2]
    return torch.where(row_mask[:, None], squares, 0).sum() / num_numbers.clamp(min=1)


def indices_loss(rows: Tensor, codebooks: Tensor, targets: Tensor, row_mask: Tensor | None, *, cosine: bool) -> Tensor:
    """The mean cross-entropy, [], of targets [C, M] for rows [C, M, D] in codebooks [C, K, D]; 0 where none counts.

    A target counts unless it is -1 or row_mask [M] leaves its row out.
    """
    if row_mask is not None:
        targets = targets.masked_fill(~row_mask, -1)
    metric: Metric = "dot" if cosine else "euclidean"
    each = zip(rows, codebooks, targets, strict=True)
    total = torch.stack([code_cross_entropy(*one, metric=metric) for one in each]).sum()
    return total / (targets != -1).sum().clamp(min=1)
