"""Gradients past the choice of codes, in one stage or in several, each of which takes what the one before left over.

With r_1 = x, c_q the code that stage q chose for r_q, r_{q+1} = r_q - c_q, and M the numbers that count, in all stages:

    quantized = Σ_q c_q,    loss = (1 + w) / M · Σ_q Σ (r_q - c_q)².

With g the gradient that arrives at `quantized`, and 1 at the loss,

    x gets g + (2·w / M)·Σ_q r_{q+1},    code k of stage q gets (2 / M)·Σ (c_k - r_q) over its rows.

Kept for the backward are x and the indices, however many stages there are: the residuals are subtracted anew.
"""

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vq_kernels.gradient import torch_backend
from vq_kernels.search.backend import choose_backend, has_float64

LEFT_OUT = -1
"""The index of a row that a stage leaves out: its code is 0, and it counts for nothing."""


class Choice(NamedTuple):
    """What Q stages chose for x [N, D].

    Attributes:
        indices: [Q, N] int64, in [0, K), or LEFT_OUT.
        codes: [N, D], the sum of the codes chosen, in x's dtype.
        sq_distances: [Q, N], of each residual to its code; of a row left out, anything.
    """

    indices: Tensor
    codes: Tensor
    sq_distances: Tensor


def pass_gradients(
    x: Tensor, codebooks: Tensor, choice: Choice, *, commitment_weight: float, complete: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """What was chosen, differentiably.

    Args:
        x: [N, D], any floating dtype.
        codebooks: [Q, K, D]. They must not change until the backward.
        choice: for x in these codebooks.
        commitment_weight: w above.
        complete: no row is left out of any stage.
        backend: as for `nearest_code`.

    Returns:
        quantized [N, D] in x's dtype, and the loss [], 0 where nothing counts.
    """
    quantized, loss, pull = _PassGradients.apply(x, codebooks, *choice, commitment_weight > 0, complete, backend)
    return quantized, loss + commitment_weight * pull if commitment_weight > 0 else loss


class _PassGradients(torch.autograd.Function):
    """(x [N, D], codebooks [Q, K, D], the parts of a `Choice`) -> quantized [N, D], loss [], pull [].

    `loss` and `pull` are one number, the mean of (r_q - c_q)²: the first moves the codes, the second moves x. They are
    weighted outside, since a graph with dynamic shapes may hold the weight as an input of its own.
    """

    @staticmethod
    def forward(
        x: Tensor,
        codebooks: Tensor,
        indices: Tensor,
        codes: Tensor,
        sq_distances: Tensor,
        pulls: bool,
        complete: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not complete:
            sq_distances = sq_distances.masked_fill(indices == LEFT_OUT, 0)
        loss = sq_distances.sum() / _num_numbers(x, indices, complete)
        return codes.clone(), loss, loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, codebooks, indices, _, _, ctx.pulls, ctx.complete, ctx.backend = inputs
        ctx.save_for_backward(x, codebooks, indices)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_quantized, grad_loss, grad_pull = grad_outputs
        x, codebooks, indices = ctx.saved_tensors
        x_needs_it, codebooks_need_it = ctx.needs_input_grad[:2]
        num_numbers = _num_numbers(x, indices, ctx.complete)
        pulls = x_needs_it and ctx.pulls
        residual, left_over, grad_codebooks = x, None, []
        for stage, (codebook, chosen) in enumerate(zip(codebooks, indices, strict=True), start=1):
            left_out = None if ctx.complete else (chosen == LEFT_OUT)[:, None]
            chosen = chosen if ctx.complete else chosen.clamp(min=0)
            if codebooks_need_it:
                rows = residual.detach()
                if left_out is not None:  # at its code, a row adds nothing to the sums
                    rows = torch.where(left_out, codebook[chosen], rows)
                sums = difference_sums(rows, codebook, chosen, ctx.backend)
                grad_codebooks.append((2 * grad_loss / num_numbers * sums).to(codebook.dtype))
            if pulls or stage < len(indices):
                residual = residual - codebook.detach()[chosen]
                residual = residual if left_out is None else residual.masked_fill(left_out, 0)
            if pulls:
                left_over = residual if left_over is None else left_over + residual
        grad_x = grad_quantized if x_needs_it else None
        if left_over is not None:
            grad_x = grad_quantized + (2 * grad_pull / num_numbers * left_over).to(grad_quantized.dtype)
        return grad_x, torch.stack(grad_codebooks) if grad_codebooks else None, *[None] * 6


def _num_numbers(x: Tensor, indices: Tensor, complete: bool) -> int | Tensor:
    """M, at least 1."""
    if complete:
        return max(x.numel(), 1) * indices.shape[0]
    return ((indices != LEFT_OUT).sum() * x.shape[1]).clamp(min=1)


_SHORTEST_NORM = 1e-6


def straight_through(x: Tensor, codes: Tensor) -> Tensor:
    """`codes` as they are, [..., D] in x's dtype; the gradient that arrives goes to x unchanged, and none to the codes.

    Source: Bengio et al. 2013, arXiv:1308.3432; van den Oord et al. 2017, arXiv:1711.00937, section 3.2.
    """
    passed: Tensor = _PassGradient.apply(x, codes, False)
    return passed


def rotation_trick(x: Tensor, codes: Tensor) -> Tensor:
    """`codes` as they are, [..., D] in x's dtype; x gets the gradient that arrives, turned and scaled from code to x.

    A code c is R·x·‖c‖/‖x‖, where R turns x's direction u into c's direction v: with w = (u + v)/‖u + v‖,
    R = 1 - 2·w·wᵀ + 2·v·uᵀ. Taken as constant, that gives x the gradient ‖c‖/‖x‖·(g - 2·w·(w·g) + 2·u·(v·g)); the
    codes get none. Norms under 1e-6 count as 1e-6.

    Source: Fifty et al. 2024, arXiv:2410.06424, section 4.2.
    """
    turned: Tensor = _PassGradient.apply(x, codes, True)
    return turned


class _PassGradient(torch.autograd.Function):
    """(x [..., D], codes [..., D]) -> codes [..., D]. Saves x and the codes, and only where the gradient is turned."""

    @staticmethod
    def forward(x: Tensor, codes: Tensor, turn: bool) -> Tensor:
        return codes.to(x.dtype, copy=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        x, codes, ctx.turn = inputs
        if ctx.turn:
            ctx.save_for_backward(x, codes)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,) = grad_outputs
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return (_turn_back(grad, *ctx.saved_tensors) if ctx.turn else grad), None, None


def _turn_back(grad: Tensor, x: Tensor, codes: Tensor) -> Tensor:
    """Rᵀ·grad·‖code‖/‖x‖, [..., D], in float32 at least."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    g, x, codes = grad.to(wide), x.detach().to(wide), codes.detach().to(wide)
    x_norm = x.norm(dim=-1, keepdim=True).clamp(min=_SHORTEST_NORM)
    code_norm = codes.norm(dim=-1, keepdim=True)
    from_direction = x / x_norm
    to_direction = codes / code_norm.clamp(min=_SHORTEST_NORM)
    middle = F.normalize(from_direction + to_direction, dim=-1, eps=_SHORTEST_NORM)
    turned = g - 2 * middle * (middle * g).sum(dim=-1, keepdim=True)
    turned = turned + 2 * from_direction * (to_direction * g).sum(dim=-1, keepdim=True)
    grad_x: Tensor = turned * (code_norm / x_norm)
    return grad_x.to(grad.dtype)


@torch.library.custom_op("vq_kernels::codebook_gradient", mutates_args=())
def codebook_gradient_op(x: Tensor, codebook: Tensor, indices: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """x [N, D], codebook [K, D], indices [N] -> the sums of (code - row) [K, D], and counts [K] int64."""
    if not has_float64(x.device):
        sums, counts = codebook_gradient_op(x.cpu(), codebook.cpu(), indices.cpu(), backend)
        return sums.to(x.device), counts.to(x.device)
    name, _ = choose_backend(x, codebook, backend)
    deterministic = x.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    if name == "triton":
        triton_backend = import_module("vq_kernels.gradient.triton_backend")  # on first use
        sums, counts = triton_backend.codebook_gradient(x, codebook, indices, deterministic)
        return sums, counts
    return torch_backend.codebook_gradient(x, codebook, indices, deterministic)


@codebook_gradient_op.register_fake
def _(x: Tensor, codebook: Tensor, indices: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    wide = torch.float64 in (x.dtype, codebook.dtype)
    sums = codebook.new_empty(codebook.shape, dtype=torch.float64 if wide else torch.float32)
    return sums, codebook.new_empty(codebook.shape[0], dtype=torch.int64)


def difference_sums(x: Tensor, codebook: Tensor, indices: Tensor, backend: str) -> Tensor:
    """The operator's sums of (code - row), [K, D], differentiably: for gradients of gradients, and for
    `torch.func.grad`, where no operator may stand that has no gradient."""
    sums: Tensor = _DifferenceSums.apply(x, codebook, indices, backend)[0]
    return sums


class _DifferenceSums(torch.autograd.Function):
    """(x [N, D], codebook [K, D], indices [N]) -> the operator's results."""

    @staticmethod
    def forward(x: Tensor, codebook: Tensor, indices: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        sums, counts = codebook_gradient_op(x, codebook, indices, backend)
        return sums, counts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, codebook, indices, _ = inputs
        ctx.dtypes = x.dtype, codebook.dtype
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(indices, output[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad = grad_outputs[0]  # [K, D]
        indices, counts = ctx.saved_tensors
        return -grad[indices].to(ctx.dtypes[0]), (counts[:, None] * grad).to(ctx.dtypes[1]), None, None
