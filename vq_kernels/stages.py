"""Gradients past the choice of codes, in one stage or in several, each of which takes what the one before left over.

With r_1 = x, c_q the code that stage q chose for r_q, r_{q+1} = r_q - c_q, and M the numbers that count, in all stages:

    quantized = Σ_q c_q,    loss = (1 + w) / M · Σ_q Σ (r_q - c_q)².

With g the gradient that arrives at `quantized`, and 1 at the loss,

    x gets g + (2·w / M)·Σ_q r_{q+1},    code k of stage q gets (2 / M)·Σ (c_k - r_q) over its rows.

Kept for the backward are x and the indices, however many stages there are: the residuals are subtracted anew.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vq_kernels.gradient import difference_sums

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
