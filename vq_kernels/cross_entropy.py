"""The cross-entropy of given codes without the N × K logits, in chunks of rows that the backward recomputes.

The logits of row x are its similarities to the K codes,

    z_k = -sqrt(max(‖x - c_k‖², 1e-8))  ("euclidean"),    or    z_k = x·c_k  ("dot"),

and the loss of a row with target t is ℓ = log Σ_k exp(z_k) - z_t. With p = softmax(z) and s = p - onehot(t),

    ∂ℓ/∂x = -Σ_k s_k·(x - c_k)/|z_k|,  ∂ℓ/∂c_k = s_k·(x - c_k)/|z_k|    or    ∂ℓ/∂x = Σ_k s_k·c_k,  ∂ℓ/∂c_k = s_k·x;

A distance below the minimum 1e-4 has no gradient. Only log Σ exp(z), one number per row, is kept for the backward.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vq_kernels.gradient.autograd import copy_for_backward
from vq_kernels.search.vmap import register_vmap

Metric = Literal["euclidean", "dot"]

IGNORED = -1
"""The target of a row that is ignored."""

_CHUNK_ELEMENTS = 1 << 21  # logits held at a time
_LEAST_SQ_DISTANCE = 1e-8


def code_cross_entropy(x: Tensor, codebook: Tensor, targets: Tensor, *, metric: Metric = "euclidean") -> Tensor:
    """Sum -log p(target) over all rows with a target, where p is the softmax over the similarities to the codes.

    Args:
        x: [N, D], any floating dtype; gets a gradient.
        codebook: [K, D]; gets a gradient. It is copied for the backward, so it may change in between.
        targets: [N] int64, in [0, K), or -1 to ignore the row.
        metric: "euclidean" or "dot", see the formulas at the head of this file.

    Returns:
        [], float32, or float64 if an input is.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    codebook, targets = copy_for_backward(codebook.to(wide), targets)
    losses, _ = _CodeCrossEntropy.apply(x.to(wide), codebook, targets, metric)
    total: Tensor = losses.sum()
    return total


class _CodeCrossEntropy(torch.autograd.Function):
    """(x [N, D], codebook [K, D], targets [N]) -> losses [N], log_sums [N]. Needed for torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, codebook: Tensor, targets: Tensor, metric: str) -> tuple[Tensor, Tensor]:
        losses, log_sums = _forward_op(x, codebook, targets, metric)
        return losses, log_sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: tuple[Tensor, Tensor]) -> None:
        x, codebook, targets, ctx.metric = inputs
        _, log_sums = output
        ctx.mark_non_differentiable(log_sums)
        ctx.save_for_backward(x, codebook, targets, log_sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_codebook = _backward_op(*ctx.saved_tensors, grad_outputs[0], ctx.metric)
        return grad_x, grad_codebook, None, None


@torch.library.custom_op("vq_kernels::code_cross_entropy", mutates_args=())
def _forward_op(x: Tensor, codebook: Tensor, targets: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """x [N, D], codebook [K, D], targets [N] -> losses [N] (0 for ignored rows), log_sums [N]."""
    ignored = targets == IGNORED
    chosen = targets.masked_fill(ignored, 0)[:, None]
    losses, log_sums = x.new_empty(x.shape[0]), x.new_empty(x.shape[0])
    with torch.autocast(x.device.type, enabled=False):
        centre = _centre(codebook, metric)
        codes = codebook - centre
        for chunk in _chunks(x.shape[0], codebook.shape[0]):
            rows = x[chunk] - centre
            logits = _logits(rows, codes, metric)
            log_sums[chunk] = logits.logsumexp(dim=1)
            losses[chunk] = log_sums[chunk] - logits.gather(1, chosen[chunk])[:, 0]
    return losses.masked_fill_(ignored, 0), log_sums


@_forward_op.register_fake
def _(x: Tensor, codebook: Tensor, targets: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0]), x.new_empty(x.shape[0])


@torch.library.custom_op("vq_kernels::code_cross_entropy_backward", mutates_args=())
def _backward_op(
    x: Tensor, codebook: Tensor, targets: Tensor, log_sums: Tensor, grad_losses: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    """The gradients of x [N, D] and of the codebook [K, D], from the gradient of the losses [N]."""
    ignored = targets == IGNORED
    chosen = targets.masked_fill(ignored, 0)[:, None]
    weights = grad_losses.masked_fill(ignored, 0)[:, None]
    grad_x, grad_codebook = torch.empty_like(x), torch.zeros_like(codebook)
    with torch.autocast(x.device.type, enabled=False):
        centre = _centre(codebook, metric)
        codes = codebook - centre
        for chunk in _chunks(x.shape[0], codebook.shape[0]):
            rows = x[chunk] - centre
            logits = _logits(rows, codes, metric)
            slopes = (logits - log_sums[chunk, None]).exp_()
            slopes.scatter_add_(1, chosen[chunk], torch.full_like(log_sums[chunk, None], -1)).mul_(weights[chunk])
            if metric == "euclidean":
                slopes.div_(-logits).masked_fill_(logits >= -(_LEAST_SQ_DISTANCE**0.5), 0)
                grad_x[chunk] = slopes @ codes - slopes.sum(dim=1, keepdim=True) * rows
                grad_codebook -= slopes.sum(dim=0)[:, None] * codes
            else:
                grad_x[chunk] = slopes @ codes
            grad_codebook.addmm_(slopes.t(), rows)
    return grad_x, grad_codebook


@_backward_op.register_fake
def _(
    x: Tensor, codebook: Tensor, targets: Tensor, log_sums: Tensor, grad_losses: Tensor, metric: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(codebook)


for _op in (_forward_op, _backward_op):
    register_vmap(_op)


def _centre(codebook: Tensor, metric: str) -> Tensor:
    """[D], subtracted from rows and codes to reduce cancellation. Distances do not change; dot products would."""
    return codebook.mean(dim=0) if metric == "euclidean" else torch.zeros_like(codebook[0])


def _logits(rows: Tensor, codes: Tensor, metric: str) -> Tensor:
    """The logits z [R, K] of rows [R, D] and codes [K, D]."""
    products = rows @ codes.t()
    if metric == "dot":
        return products
    sq_distances = products.mul_(-2).add_(rows.square().sum(dim=1, keepdim=True)).add_(codes.square().sum(dim=1))
    return sq_distances.clamp_(min=_LEAST_SQ_DISTANCE).sqrt_().neg_()


def _chunks(num_rows: int, num_codes: int) -> Iterator[slice]:
    """Slices of the rows, each with at most _CHUNK_ELEMENTS logits."""
    rows = max(1, _CHUNK_ELEMENTS // num_codes)
    return (slice(start, start + rows) for start in range(0, num_rows, rows))
