"""Quantization with gradients: the choice of codes, the straight-through estimator, the gradient of the codebook.

A quantizer has Q >= 1 stages, each of which quantizes the residual of the previous one. With r_1 = x, c_q the code that
stage q chose for r_q, r_{q+1} = r_q - c_q, w the commitment weight and M the number of elements that count, in all
stages:

    quantized = Σ_q c_q,    loss = (1 + w) / M · Σ_q Σ (r_q - c_q)².

With g the gradient with respect to `quantized`, and 1 with respect to the loss,

    x gets g + (2·w / M)·Σ_q r_{q+1},    code k of stage q gets (2 / M)·Σ (c_k - r_q) over its rows.

The backward needs x and the indices, for any number of stages: it subtracts the residuals again.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vq_kernels.cosine import most_similar_index, unit
from vq_kernels.search.api import nearest_code_op
from vq_kernels.search.backend import Backend, captures_triton, choose_backend, has_float64
from vq_kernels.search.operators import define_operator
from vq_kernels.search.validation import is_eager, is_tracing
from vq_kernels.search.vmap import register_vmap

Metric = Literal["euclidean", "cosine"]
METRICS = ("euclidean", "cosine")

LEFT_OUT = -1
"""The index of a row that a stage leaves out. Its code is 0, and it does not count."""

_BUFFER_ELEMENTS = 1 << 20  # differences held at a time
_SHORTEST_NORM = 1e-6
_NORM_SCALE = 2.0**-16


class Choice(NamedTuple):
    """The choice of Q stages for x [N, D].

    Attributes:
        indices: [Q, N] int64, in [0, K), or LEFT_OUT.
        codes: [N, D], the sum of the chosen codes, in x's dtype.
        sq_distances: [Q, N], float64 if the device has it, from each residual to its code; undefined for rows left out.
    """

    indices: Tensor
    codes: Tensor
    sq_distances: Tensor


def choose(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: Metric = "euclidean",
    operands: Sequence[Tensor] = (),
    backend: Backend = "auto",
) -> Choice:
    """Chooses a code for each row in one stage. Arguments and results have no gradient.

    Args:
        x: [N, D]; unit vectors if the metric is "cosine".
        codebook: [K, D]; likewise.
        metric: "euclidean", the nearest code; "cosine", the code with the largest dot product.
        operands: what the backend prepared of the codebook for "euclidean", or nothing.
        backend: as for `nearest_code`.
    """
    if metric == "cosine":
        indices = most_similar_index(x, codebook, backend, unit_codes=True)
        chosen = codebook.index_select(0, indices)
        codes, sq_distances = chosen.to(x.dtype), (x - chosen).square().sum(dim=1)
    else:
        indices, codes, sq_distances, _ = nearest_code_op(x, codebook, list(operands), backend)
    return Choice(indices[None], codes, sq_distances[None])


def pass_gradients(
    x: Tensor,
    codebooks: Tensor,
    choice: Choice,
    *,
    commitment_weight: float,
    complete: bool,
    backend: str,
    trains_codes: bool = True,
) -> tuple[Tensor, Tensor]:
    """Returns the chosen codes and the loss with the gradients above.

    Args:
        x: [N, D], any floating dtype.
        codebooks: [Q, K, D]. They are copied for the backward, so they may change in between.
        choice: for x in these codebooks.
        commitment_weight: w above.
        complete: no stage leaves out a row.
        backend: as for `nearest_code`.
        trains_codes: whether the loss contains the part that trains the codes.

    Returns:
        quantized [N, D] in x's dtype, and the loss [], which is 0 if no row counts.
    """
    codebooks, sq_distances = copy_for_backward(codebooks, choice.sq_distances)
    choice = choice._replace(sq_distances=sq_distances)
    quantize = _Quantize.forward if is_tracing() else _Quantize.apply  # a trace cannot hold a Function
    quantized, loss, commitment = quantize(x, codebooks, *choice, commitment_weight > 0, complete, backend)
    if commitment_weight == 0 and trains_codes:
        return quantized, loss
    return quantized, commitment_weight * commitment + loss if trains_codes else commitment_weight * commitment


def copy_for_backward(codes: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a copy of `codes` [..., D] with their gradient, and `used`, which the forward must use.

    Without a backward to follow, it returns both as they are.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_exporting() or is_tracing():
        return codes, used
    if not torch.compiler.is_compiling():
        return codes.clone(), used
    copy, used = _Copy.apply(codes, used)
    return copy, used


class _Copy(torch.autograd.Function):
    """(codes [..., D], used) -> copies, by an operator.

    A compiler moves what the forward does not use into the backward, where the codes may have changed. It keeps an
    operator in the forward that makes something else there, `used`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(codes: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
        copy, used = _copy_op(codes, used)
        return copy, used

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


@torch.library.custom_op("vq_kernels::copy", mutates_args=())
def _copy_op(codes: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    return codes.clone(), used.clone()


@_copy_op.register_fake
def _(codes: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(codes), torch.empty_like(used)


register_vmap(_copy_op)


class _Quantize(torch.autograd.Function):
    """(x [N, D], codebooks [Q, K, D], the fields of a `Choice`) -> quantized [N, D], loss [], commitment [].

    `loss` and `commitment` are the same number, the mean of (r_q - c_q)². The first has the gradient of the codes, the
    second that of x. The weight is applied outside, because a graph with dynamic shapes may hold it as an input.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        codebooks: Tensor,
        indices: Tensor,
        codes: Tensor,
        sq_distances: Tensor,
        commits: bool,
        complete: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not complete:
            sq_distances = sq_distances.masked_fill(indices == LEFT_OUT, 0)
        wide = torch.float64 in (x.dtype, codebooks.dtype)
        mean = (sq_distances / _num_numbers(x, indices, complete)).sum()  # divided first, so that the sum is finite
        loss = mean.to(torch.float64 if wide else torch.float32)
        return codes.clone(), loss, loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, codebooks, indices, _, _, ctx.commits, ctx.complete, ctx.backend = inputs
        ctx.save_for_backward(x, codebooks, indices)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_quantized, grad_loss, grad_commitment = grad_outputs
        x, codebooks, indices = ctx.saved_tensors
        needs_x, needs_codebooks = ctx.needs_input_grad[:2]
        num_numbers = _num_numbers(x, indices, ctx.complete)
        commits = needs_x and ctx.commits
        wide = torch.promote_types(torch.promote_types(x.dtype, codebooks.dtype), torch.float32)
        residual, residual_sum, grad_codebooks = x, None, []
        for stage, (codebook, chosen) in enumerate(zip(codebooks, indices, strict=True), start=1):
            left_out = None if ctx.complete else (chosen == LEFT_OUT)[:, None]
            chosen = chosen if ctx.complete else chosen.clamp(min=0)
            if needs_codebooks:
                rows = residual.detach()
                if left_out is not None:  # a row at its code adds 0
                    rows = torch.where(left_out, codebook[chosen], rows)
                # Only second derivatives need a Function, which takes long to call.
                differences = _DifferenceMeans.apply if torch.is_grad_enabled() else codebook_gradient_op
                means, _ = differences(rows, codebook, chosen, max(x.shape[0], 1), ctx.backend)
                grad_codebooks.append((2 * grad_loss * x.shape[0] / num_numbers * means).to(codebook.dtype))
            if commits or stage < len(indices):
                residual = residual.to(wide) - codebook.detach()[chosen]
                residual = residual if left_out is None else residual.masked_fill(left_out, 0)
            if commits:
                residual_sum = residual if residual_sum is None else residual_sum + residual
        grad_x = grad_quantized if needs_x else None
        if residual_sum is not None:
            grad_x = grad_quantized + (2 * grad_commitment / num_numbers * residual_sum).to(grad_quantized.dtype)
        if not grad_codebooks:
            return grad_x, *[None] * 7
        return grad_x, torch.stack(grad_codebooks) if len(indices) > 1 else grad_codebooks[0][None], *[None] * 6


def _num_numbers(x: Tensor, indices: Tensor, complete: bool) -> int | Tensor:
    """M, at least 1."""
    if complete:
        return max(x.numel(), 1) * indices.shape[0]
    return ((indices != LEFT_OUT).sum() * x.shape[1]).clamp(min=1)


def straight_through(x: Tensor, codes: Tensor) -> Tensor:
    """Returns `codes` [..., D] in x's dtype. Its gradient goes to x unchanged, and not to the codes.

    Source: Bengio et al. 2013, arXiv:1308.3432; van den Oord et al. 2017, arXiv:1711.00937, section 3.2.
    """
    result: Tensor = _StraightThrough.apply(x, codes, False)
    return result


def rotation_trick(x: Tensor, codes: Tensor) -> Tensor:
    """Returns `codes` [..., D] in x's dtype. Its gradient goes to x, rotated and scaled from the code to x.

    A code c is R·x·‖c‖/‖x‖, where R rotates x's direction u to c's direction v: with w = (u + v)/‖u + v‖,
    R = 1 - 2·w·wᵀ + 2·v·uᵀ. Taken as a constant, this gives x the gradient ‖c‖/‖x‖·(g - 2·w·(w·g) + 2·u·(v·g)). The
    codes get none. In the ratio, a norm ‖x‖ under 1e-6 counts as 1e-6.

    Source: Fifty et al. 2024, arXiv:2410.06424, section 4.2.
    """
    result: Tensor = _StraightThrough.apply(x, codes, True)
    return result


class _StraightThrough(torch.autograd.Function):
    """(x [..., D], codes [..., D]) -> codes [..., D]. Saves x and the codes only if the gradient is rotated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, codes: Tensor, rotate: bool) -> Tensor:
        return codes.to(x.dtype, copy=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        x, codes, ctx.rotate = inputs
        if ctx.rotate:
            ctx.save_for_backward(x, codes)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,) = grad_outputs
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return (_rotate_back(grad, *ctx.saved_tensors) if ctx.rotate else grad), None, None


def _rotate_back(grad: Tensor, x: Tensor, codes: Tensor) -> Tensor:
    """Rᵀ·grad·‖code‖/‖x‖, [..., D], in float32 at least."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    g, x, codes = grad.to(wide), x.detach().to(wide), codes.detach().to(wide)
    from_direction, to_direction = unit(x), unit(codes)
    # Norms without squares, and scaled, so that they do not overflow.
    x_norm = (x * _NORM_SCALE * from_direction).sum(dim=-1, keepdim=True).clamp(min=_SHORTEST_NORM * _NORM_SCALE)
    code_norm = (codes * _NORM_SCALE * to_direction).sum(dim=-1, keepdim=True)
    middle = F.normalize(from_direction + to_direction, dim=-1, eps=_SHORTEST_NORM)
    rotated = g - 2 * middle * (middle * g).sum(dim=-1, keepdim=True)
    rotated = rotated + 2 * from_direction * (to_direction * g).sum(dim=-1, keepdim=True)
    grad_x: Tensor = rotated * (code_norm / x_norm)
    return grad_x.to(grad.dtype)


def codebook_gradient(
    x: Tensor, codebook: Tensor, indices: Tensor, divisor: int, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """Sum (code - row) / divisor over the rows of each code, and count the rows.

    The differences are summed in float64, because n·c - Σx cancels if the codes are good, and divided
    before they are rounded, so that float32 holds the quotient.

    Args:
        x: [N, D], a floating dtype.
        codebook: [K, D].
        indices: [N] int64 in [0, K).
        divisor: at least 1.
        deterministic: add the rows of each code in order, on every device; otherwise CUDA adds atomically.

    Returns:
        [K, D] float32 (float64 if an input is), and counts [K] int64.
    """
    num_codes, code_dim = codebook.shape
    sums = torch.zeros(num_codes, code_dim, dtype=torch.float64, device=x.device)
    rows = max(1, _BUFFER_ELEMENTS // code_dim)
    for start in range(0, x.shape[0], rows):
        chosen = indices[start : start + rows]
        difference = codebook.index_select(0, chosen).double() - x[start : start + rows]
        if not deterministic:
            sums.index_add_(0, chosen, difference)
            continue
        ordered, order = torch.sort(chosen, stable=True)
        present, counts = torch.unique_consecutive(ordered, return_counts=True)
        sums[present] += F.embedding_bag(order, difference, counts.cumsum(0) - counts, mode="sum")
    wide = torch.float64 in (x.dtype, codebook.dtype)
    means = sums.div_(divisor).to(torch.float64 if wide else torch.float32)
    return means, torch.bincount(indices, minlength=num_codes)


def codebook_gradient_op(
    x: Tensor, codebook: Tensor, indices: Tensor, divisor: int, backend: str
) -> tuple[Tensor, Tensor]:
    """x [N, D], codebook [K, D], indices [N] -> Σ (code - row) / divisor over the rows of a code [K, D], counts [K]."""
    if is_eager(x, codebook):
        gradient = _gradient_by_backend
    else:
        gradient = _triton_operator if captures_triton(x, codebook, backend) else _gradient_operator
    means, counts = gradient(x, codebook, indices, divisor, backend)
    return means, counts


def _gradient_by_backend(
    x: Tensor, codebook: Tensor, indices: Tensor, divisor: int, backend: str
) -> tuple[Tensor, Tensor]:
    if not has_float64(x.device):
        means, counts = _gradient_by_backend(x.cpu(), codebook.cpu(), indices.cpu(), divisor, backend)
        return means.to(x.device), counts.to(x.device)
    # float64 rows may have been searched by what another backend prepared
    name = "torch" if torch.float64 in (x.dtype, codebook.dtype) else choose_backend(x, codebook, backend)[0]
    deterministic = x.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    if name == "triton":
        triton_backend = import_module("vq_kernels.gradient.triton_backend")  # on first use
        means, counts = triton_backend.codebook_gradient(x, codebook, indices, divisor, deterministic)
        return means, counts
    if name == "llvm":
        llvm_backend = import_module("vq_kernels.gradient.llvm_backend")  # on first use
        means, counts = llvm_backend.codebook_gradient(x, codebook, indices, divisor)
        return means, counts
    return codebook_gradient(x, codebook, indices, divisor, deterministic)


def _gradient_fake(x: Tensor, codebook: Tensor, indices: Tensor, divisor: int, backend: str) -> tuple[Tensor, Tensor]:
    wide = torch.float64 in (x.dtype, codebook.dtype)
    means = codebook.new_empty(codebook.shape, dtype=torch.float64 if wide else torch.float32)
    return means, codebook.new_empty(codebook.shape[0], dtype=torch.int64)


_gradient_operator = define_operator("codebook_gradient", _gradient_by_backend, _gradient_fake, waits=True)
_triton_operator = define_operator("codebook_gradient_triton", _gradient_by_backend, _gradient_fake)


class _DifferenceMeans(torch.autograd.Function):
    """The operator above with a gradient, for second derivatives.

    A gradient registered with the operator would not do, because `torch.func.grad` rejects it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, codebook: Tensor, indices: Tensor, divisor: int, backend: str) -> tuple[Tensor, Tensor]:
        means, counts = codebook_gradient_op(x, codebook, indices, divisor, backend)
        return means, counts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, codebook, indices, ctx.divisor, _ = inputs
        ctx.dtypes = x.dtype, codebook.dtype
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(indices, output[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        indices, counts = ctx.saved_tensors
        grad = grad_outputs[0] / ctx.divisor  # [K, D]
        return -grad[indices].to(ctx.dtypes[0]), (counts[:, None] * grad).to(ctx.dtypes[1]), None, None, None
