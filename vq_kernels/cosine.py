"""The most similar code: the exact argmax of the dot product, by the exact search for the nearest."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vq_kernels.search import nearest_code
from vq_kernels.search.backend import Backend, has_float64
from vq_kernels.search.validation import check_pair

_SHORTEST_NORM = 1e-6
_STEPS = 3  # coordinates added, of 22 bits each: 66 bits of M are more than float64 holds
_BELOW = 1 - 2.0**-23  # so that the rounding to float32 does not pass the square root


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
    """x [..., D] divided by its norm; by 1e-6 where that is shorter, so that 0 stays 0."""
    return F.normalize(x, dim=-1, eps=_SHORTEST_NORM)


def most_similar_code(x: Tensor, codebook: Tensor, *, backend: Backend = "auto") -> SimilarCode:
    """The codebook row with the largest dot product with each vector; the cosine's, where both are `unit`.

    On unit vectors the nearest code is not it: a norm rounded to float32 is off 1 by up to 1e-7, and distances take
    that for a difference. So each code gets coordinates that bring all codes to one length, and x gets zeros there:
    with M = max ‖c_k‖² and a_k of length² M - ‖c_k‖²,

        ‖(x, 0) - (c_k, a_k)‖² = ‖x‖² + M - 2·x·c_k,

    and the nearest of those is the code with the largest x·c_k. ‖c_k‖² is a float64 sum of exact squares, off by at
    most D·2⁻⁵³·M. a_k has three coordinates of x's own dtype, each the square root of what the ones before left over,
    rounded down by up to 3·2⁻²⁴ of itself: less than 2⁻⁶⁴·M of the length² is missing. The search tells distances apart
    down to float64's rounding of them, D·2⁻⁵³ of up to 4·M for an x as long as the codes. So two codes are told apart
    wherever their dot products differ by more than about 4·D·2⁻⁵³·M, a few times what a float64 dot product's own
    rounding may come to: closer ones count as equal, and either may be given. Two kinds of ties are none of rounding,
    and give the lowest index: identical codes, and a row of zeros.

    Args:
        x: [..., D], float32, float16, bfloat16 or float64.
        codebook: [K, D], K >= 1, on x's device; its dtype may differ from x's.
        backend: as for `nearest_code`.

    Returns:
        SimilarCode(indices [...] int64 in [0, K), codes [..., D] in x's dtype, similarities [...]). Not differentiable.
        NaN and Inf as for `nearest_code`.

    Raises:
        TypeError, ValueError, RuntimeError: as for `nearest_code`.

    Source: the reduction of inner products to distances, Bachrach et al. 2014, "Speeding up the Xbox recommender
    system using a Euclidean transformation for inner-product spaces", theorem 1; the bound is derived above.
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
    """[K, 3]: coordinates that bring all finite codes [K, D] to the length of the longest; NaN for the others."""
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
