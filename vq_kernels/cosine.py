"""The code with the largest dot product, and vectors of length 1."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import _register_namedtuple

from vq_kernels.search import nearest_code, nearest_code_topk, torch_backend
from vq_kernels.search.backend import Backend, captures_triton, choose_backend, has_float64
from vq_kernels.search.operators import WAITS
from vq_kernels.search.torch_bounds import power_of_two_below
from vq_kernels.search.validation import check_pair, is_eager
from vq_kernels.search.vmap import register_vmap

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


_register_namedtuple(SimilarCode, serialized_type_name="vq_kernels.SimilarCode")  # for torch.export.save


def unit(x: Tensor) -> Tensor:
    """Divide each row of x [..., D] by its norm. Every finite row but 0 gets length 1; 0 stays 0."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = wide * _safe_scales(wide)
    norms = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return (scaled / torch.where(norms == 0, 1.0, norms)).to(x.dtype)


def _safe_scales(x: Tensor) -> Tensor:
    """Powers of two [..., 1] by which the rows of x [..., D] have squares in range; 1 for most rows, and for 0."""
    wider = 8 if x.dtype == torch.float64 else 1  # than the range of float32's exponents
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    scales = torch.ones_like(largest).masked_fill(largest > 2.0 ** (40 * wider), 2.0 ** (-88 * wider))
    return scales.masked_fill((largest > 0) & (largest < 2.0 ** (-40 * wider)), 2.0 ** (100 * wider))


def most_similar_code(x: Tensor, codebook: Tensor, *, backend: Backend = "auto") -> SimilarCode:
    """Find the codebook row with the largest dot product with each vector. For `unit` vectors this is the cosine.

    The indices equal those of a float64 brute force over the same values, with the lowest index on a tie. If two
    products x·c differ by less than a float64 dot product is accurate to, 2⁻⁴⁷·D·‖x‖·‖c‖ for either code c, either may
    be returned. Two kinds of ties do not depend on rounding: identical codes, and a row of zeros. Vectors may have any
    length: none overflows or underflows.

    Args:
        x: [..., D], float32, float16, bfloat16 or float64.
        codebook: [K, D], K >= 1, on x's device; its dtype may differ from x's.
        backend: as for `nearest_code`. If code lengths differ by more than a factor of two, PyTorch operators search
            for "triton" too.

    Returns:
        SimilarCode(indices [...] int64 in [0, K), codes [..., D] in x's dtype, similarities [...], inf if the dtype
        overflows). Not differentiable. NaN and Inf are treated as by `nearest_code`.

    Raises:
        TypeError, ValueError, RuntimeError: as `nearest_code`.

    Source: docs/explanations/exactness.md.
    """
    check_pair(x, codebook)
    rows = x.detach().reshape(-1, x.shape[-1])
    indices = most_similar_index(rows, codebook.detach(), backend)
    chosen = codebook.detach().index_select(0, indices)
    wide = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    left, right = rows.to(wide), chosen.to(wide)
    left_scales, right_scales = _safe_scales(left), _safe_scales(right)
    products = (left * left_scales * (right * right_scales)).sum(dim=1, keepdim=True)
    both = left_scales * right_scales  # in range if they differ
    products = torch.where(left_scales == right_scales, products / left_scales / right_scales, products / both)[:, 0]
    similarities = torch.where(rows.isfinite().all(dim=1), products, torch.nan)
    leading = x.shape[:-1]
    return SimilarCode(indices.view(leading), chosen.to(x.dtype).view(x.shape), similarities.view(leading))


def most_similar_codes(x: Tensor, codebook: Tensor, k: int) -> Tensor:
    """Find the k codes [N, k] with the largest dot products for x [N, D] in codebook [K, D], the largest first.

    The codes have about the same length. For k = 1 it finds what `most_similar_code` does.
    """
    rows, lengthened = _to_equal_length(x, codebook)
    first_usable = lengthened.isfinite().all(dim=1).logical_not().argsort(stable=True)[:k]
    return torch.where(x.any(dim=1, keepdim=True), nearest_code_topk(rows, lengthened, k).indices, first_usable)


def most_similar_index(x: Tensor, codebook: Tensor, backend: Backend, *, unit_codes: bool = False) -> Tensor:
    """Find the indices [N] of `most_similar_code` for x [N, D] and codebook [K, D].

    `unit_codes` promises that all codes have length 1 or 0, so that no step waits for the device to measure them.
    """
    if torch.onnx.is_in_onnx_export():
        return _nearest_of_equal_length(x, codebook, backend)
    if unit_codes and not is_eager(x, codebook) and captures_triton(x, codebook, backend):
        return _nearest_of_equal_length(x, codebook, backend)  # what the operator does, without its tag
    found: Tensor = most_similar_code_op(x, codebook, backend, unit_codes)
    return found


@torch.library.custom_op("vq_kernels::most_similar_code", mutates_args=(), tags=WAITS)
def most_similar_code_op(x: Tensor, codebook: Tensor, backend: str, unit_codes: bool) -> Tensor:
    """x [N, D], codebook [K, D] -> indices [N] int64."""
    if not has_float64(x.device):
        indices: Tensor = most_similar_code_op(x.cpu(), codebook.cpu(), backend, unit_codes)
        return indices.to(x.device)
    name, _ = choose_backend(x, codebook, backend)
    if name != "triton":
        return torch_backend.most_similar(x, codebook)
    if not unit_codes:
        scaled, equal = _scaled_if_equal(codebook.float())
        if not equal:
            return torch_backend.most_similar(x, codebook)
        rows = x.float() * power_of_two_below(x.float().abs().amax(dim=1, keepdim=True))
        x, codebook = rows * power_of_two_below(rows.norm(dim=1, keepdim=True)), scaled
    return _nearest_of_equal_length(x, codebook, "triton")


@most_similar_code_op.register_fake
def _(x: Tensor, codebook: Tensor, backend: str, unit_codes: bool) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


register_vmap(most_similar_code_op, num_row_outputs=1)


def _scaled_if_equal(codebook: Tensor) -> tuple[Tensor, bool]:
    """The codes [K, D] scaled so that the longest has about length 1, and whether no other but 0 is half as long."""
    usable = codebook.isfinite().all(dim=1)
    largest = torch.where(usable[:, None], codebook.abs(), 0).amax()
    scaled = codebook * power_of_two_below(largest)
    lengths = scaled.double().norm(dim=1)
    longest = torch.where(usable, lengths, 0).amax()
    unequal = usable & (lengths > 0) & (2 * lengths < longest)
    return scaled * power_of_two_below(longest).float(), not bool(unequal.any())


def _nearest_of_equal_length(x: Tensor, codebook: Tensor, backend: Backend) -> Tensor:
    """The indices [N] of the most similar codes, if all codes but 0 have about the same length.

    The nearest code is not always the most similar one, even among unit vectors: a norm rounded to float32 differs from
    1 by up to 1e-7, which changes the distances. Each code therefore gets additional coordinates a_k that give all
    codes the same length, and x gets zeros there. With M = max ‖c_k‖² and ‖a_k‖² = M - ‖c_k‖²,

        ‖(x, 0) - (c_k, a_k)‖² = ‖x‖² + M - 2·x·c_k,

    so the nearest of these is the code with the largest x·c_k.

    Source: Bachrach et al. 2014, "Speeding up the Xbox recommender system using a Euclidean transformation for
    inner-product spaces", theorem 1.
    """
    rows, lengthened = _to_equal_length(x, codebook)
    found = nearest_code(rows, lengthened, backend=backend)
    first_usable = lengthened.isfinite().all(dim=1).int().argmax()
    return torch.where(x.any(dim=1), found.indices, first_usable)


def _to_equal_length(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (x, 0) [N, D + 3], and the codes (c_k, a_k) [K, D + 3], which have equal lengths."""
    wide = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    codes = codebook.to(wide)
    return F.pad(x.to(wide), (0, _STEPS)), torch.cat([codes, _missing_length(codes)], dim=1)


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
