"""The code with the largest dot product, found exactly by the nearest-code search."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vq_kernels.search import nearest_code
from vq_kernels.search.backend import Backend, has_float64
from vq_kernels.search.validation import check_pair

_SHORTEST_NORM = 1e-6
_STEPS = 3  # added coordinates, of 22 bits each: 66 bits of M, more than float64 holds
_BELOW = 1 - 2.0**-23  # keeps the rounding to float32 below the square root


class SimilarCode(NamedTuple):
    """What `most_similar_code` returns.

    Attributes:
        indices: [...], int64, in [0, K).
        codes: [..., D], the codebook's rows at `indices`, in x's dtype.
        similarities: [...], float32 (float64 for float64 input), x·code; NaN for a row holding NaN or Inf.
    """

    indices: Tensor
    codes: Tensor
    similarities: Tensor


def unit(x: Tensor) -> Tensor:
    """Divide x [..., D] by its norm, or by 1e-6 if that is larger, so that 0 stays 0."""
    return F.normalize(x, dim=-1, eps=_SHORTEST_NORM)


def most_similar_code(x: Tensor, codebook: Tensor, *, backend: Backend = "auto") -> SimilarCode:
    """Find the codebook row with the largest dot product with each vector. For `unit` vectors this is the cosine.

    The nearest code is not always the most similar one, even among unit vectors: a norm rounded to float32 differs from
    1 by up to 1e-7, which changes the distances. Each code therefore gets additional coordinates a_k that give all
    codes the same length, and x gets zeros there. With M = max ‖c_k‖² and ‖a_k‖² = M - ‖c_k‖²,

        ‖(x, 0) - (c_k, a_k)‖² = ‖x‖² + M - 2·x·c_k,

    so the nearest of these is the code with the largest x·c_k.

    Two codes are distinguished if their dot products differ by more than about 4·D·2⁻⁵³·M, a few times the rounding
    error of a float64 dot product (docs/explanations/exactness.md). Closer ones count as equal, and either may be
    returned. Two kinds of ties do not depend on rounding and give the lowest index: identical codes, and a row of
    zeros.

    Args:
        x: [..., D], float32, float16, bfloat16 or float64.
        codebook: [K, D], K >= 1, on x's device; its dtype may differ from x's.
        backend: as for `nearest_code`.

    Returns:
        SimilarCode(indices [...] int64 in [0, K), codes [..., D] in x's dtype, similarities [...]). Not differentiable.
        NaN and Inf are treated as by `nearest_code`.

    Raises:
        TypeError, ValueError, RuntimeError: as `nearest_code`.

    Source: Bachrach et al. 2014, "Speeding up the Xbox recommender system using a Euclidean transformation for
    inner-product spaces", theorem 1.
    """
    check_pair(x, codebook)
    wider = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    rows, codes = x.detach().reshape(-1, x.shape[-1]).to(wider), codebook.detach().to(wider)
    lengthened = torch.cat([codes, _missing_length(codes)], dim=1)  # [K, D + 3]
    found = nearest_code(F.pad(rows, (0, _STEPS)), lengthened, backend=backend)
    first_usable = lengthened.isfinite().all(dim=1).int().argmax()
    indices = torch.where(rows.any(dim=1), found.indices, first_usable)
    chosen = codes.index_select(0, indices)
    similarities = torch.where(rows.isfinite().all(dim=1), (rows * chosen).sum(dim=1), torch.nan)
    leading = x.shape[:-1]
    return SimilarCode(indices.view(leading), chosen.to(x.dtype).view(x.shape), similarities.view(leading))


def _missing_length(codes: Tensor) -> Tensor:
    """Coordinates [K, 3] that give all finite codes [K, D] the length of the longest; NaN for other codes."""
    if not has_float64(codes.device):
        return _missing_length(codes.cpu()).to(codes.device)
    sq_norms = codes.double().square().sum(dim=1)
    missing = torch.where(sq_norms.isfinite(), sq_norms, 0.0).amax(dim=0) - sq_norms
    missing = torch.where(sq_norms.isfinite(), missing, torch.nan)
    steps = []
    for _ in range(_STEPS):
        step = (missing.clamp(min=0).sqrt() * _BELOW).to(codes.dtype)
        missing = missing - step.double().square()
        steps.append(step)
    return torch.stack(steps, dim=1)
