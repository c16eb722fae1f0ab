"""The parts of the loss of `VectorQuantize`, and the directional noise of DiVeQ."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import _register_namedtuple

from vq_kernels.cross_entropy import code_cross_entropy
from vq_kernels.gradient.autograd import LEFT_OUT

_SHORTEST = 1e-6  # a shorter vector is divided by this


class LossBreakdown(NamedTuple):
    """The parts of the loss, [] each, before they are weighted. Parts that the layer does not use are 0."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


_register_namedtuple(LossBreakdown, serialized_type_name="vq_kernels.LossBreakdown")  # for torch.export.save


def commitment_loss(rows: Tensor, codes: Tensor, row_mask: Tensor | None, shape: torch.Size | None = None) -> Tensor:
    """Returns the mean of (row - code)², [], over rows [C, M, D] that row_mask [M] does not exclude; 0 for none.

    With `shape`, it returns the mean of each row instead, in this shape of C·M elements; 0 for rows excluded.
    """
    each = (F.mse_loss(rows, codes, reduction="none") / rows.shape[2]).sum(dim=-1)  # divided first, to be finite
    if row_mask is not None:
        each = torch.where(row_mask, each, 0)
    if shape is not None:
        return each.view(shape)
    num_rows = max(each.numel(), 1) if row_mask is None else (row_mask.sum() * rows.shape[0]).clamp(min=1)
    return (each / num_rows).sum()


def cross_entropy(rows: Tensor, codebooks: Tensor, targets: Tensor, row_mask: Tensor | None, *, cosine: bool) -> Tensor:
    """Returns the mean cross-entropy, [], of targets [C, M] for rows [C, M, D] in codebooks [C, K, D]; 0 for none.

    A target counts unless it is -1 or row_mask [M] excludes its row.
    """
    if row_mask is not None:
        targets = targets.masked_fill(~row_mask, LEFT_OUT)
    each = zip(rows, codebooks, targets, strict=True)
    total = torch.stack([code_cross_entropy(*one, metric="dot" if cosine else "euclidean") for one in each]).sum()
    return total / (targets != LEFT_OUT).sum().clamp(min=1)


def orthogonal_loss(codes: Tensor, chosen: Tensor | None, most: int | None) -> Tensor:
    """Returns the mean of the squared cosines of all pairs of codes [C, K, D] of a codebook, minus 1/K, [].

    It is 0 if all codes are orthogonal. With indices `chosen`, only these codes count; with `most`, only so many random
    ones. The Gram matrix of the smaller side has the same sum of squares.

    Source: Shin et al. 2021, "Translation-equivariant image quantizer", arXiv:2112.00384, eq. 2.
    """
    if chosen is not None:
        codes = codes[:, torch.unique(chosen)]
    if most is not None and codes.shape[1] > most:
        codes = codes[:, torch.randperm(codes.shape[1], device=codes.device)[:most]]
    num_books, num_codes, code_dim = codes.shape
    directions = F.normalize(codes, dim=-1, eps=_SHORTEST)
    left, right = directions, directions.transpose(1, 2)
    with torch.autocast(codes.device.type, enabled=False):
        gram = left @ right if num_codes < code_dim else right @ left
    loss: Tensor = gram.square().sum() / (num_books * num_codes**2) - 1 / num_codes
    return loss


def directional_noise(x: Tensor, codes: Tensor, variance: float) -> Tensor:
    """Returns x [..., D] moved towards its code by their distance, in a direction with Gaussian noise.

    The direction is a constant: x gets the gradient as it is, and the distance passes one to x and the code.

    Source: Vali et al. 2025, arXiv:2509.26469.
    """
    error = codes - x
    noisy = error + math.sqrt(variance) * torch.randn_like(error)
    direction: Tensor = F.normalize(noisy, dim=-1, eps=_SHORTEST).detach()
    distance: Tensor = torch.linalg.vector_norm(error, dim=-1, keepdim=True)
    return x + direction * distance
