"""Vector quantization with straight-through gradients."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vq_kernels.gradient import codebook_gradient_op
from vq_kernels.search.backend import BACKENDS, Backend
from vq_kernels.search.checks import check_choice, check_pair
from vq_kernels.search.op import nearest_code_op


class Quantized(NamedTuple):
    """What quantization returns.

    Attributes:
        quantized: [..., D], each row's nearest code, in x's dtype.
        indices: [...], int64, in [0, K).
        loss: [], float32 (float64 for float64 input), the mean over all numbers of (x - code)².
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor


def vector_quantize(
    x: Tensor, codebook: Tensor, *, commitment_weight: float = 0.0, backend: Backend = "auto"
) -> Quantized:
    """Replace each row of x by its nearest code, differentiably.

    With q the codes chosen, M = N·D numbers, and g the gradient that arrives at `quantized`:

    - x gets g, unchanged (straight-through), and nothing of the loss: it is MSE(x detached, q);
    - the codebook gets the gradient of `loss`, (2 / M)·Σ (c_k - x) over the rows of each code k, and nothing of g;
    - with a commitment_weight w, `loss` adds w·MSE(x, q detached), and x gets (2·w / M)·(x - q) more.

    Args:
        x: [..., D], float32, float16, bfloat16 or float64, any strides.
        codebook: [K, D], K >= 1, on x's device; its dtype may differ from x's.
        commitment_weight: w above, >= 0. The specification has none.
        backend: as for `nearest_code`.

    Returns:
        Quantized(quantized [..., D] in x's dtype, indices [...] int64, loss []). The loss of no rows is 0.

    Raises:
        TypeError, ValueError, RuntimeError: as for `nearest_code`; ValueError for a negative commitment_weight.

    Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 3.
    """
    check_pair(x, codebook)
    check_choice("backend", backend, BACKENDS)
    if not commitment_weight >= 0:
        raise ValueError(f"commitment_weight must be >= 0, got {commitment_weight}")
    rows = x.reshape(-1, x.shape[-1])
    quantized, indices, loss = _VectorQuantize.apply(rows, codebook, float(commitment_weight), backend)
    return Quantized(quantized.view(x.shape), indices.view(x.shape[:-1]), loss)


class _VectorQuantize(torch.autograd.Function):
    """(x [N, D], codebook [K, D]) -> (quantized [N, D], indices [N], loss [])."""

    @staticmethod
    def forward(x: Tensor, codebook: Tensor, commitment_weight: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        indices, quantized, sq_distances, _ = nearest_code_op(x, codebook, [], backend, "exact")
        if torch.float64 in (x.dtype, codebook.dtype):  # sq_distances are float32
            sq_distances = (x - codebook[indices]).square().sum(dim=1)
        loss = (1 + commitment_weight) * sq_distances.sum() / max(x.numel(), 1)
        return quantized, indices, loss

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, float, str], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        x, codebook, ctx.commitment_weight, ctx.backend = inputs
        _, indices, _ = output
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(x, codebook, indices)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_quantized, _, grad_loss = grad_outputs
        x, codebook, indices = ctx.saved_tensors
        scale = 2 * grad_loss / max(x.numel(), 1)
        grad_x = grad_codebook = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_quantized
            if ctx.commitment_weight:
                pull = (ctx.commitment_weight * scale) * (x - codebook[indices])
                grad_x = grad_x + pull.to(grad_x.dtype)
        if ctx.needs_input_grad[1]:
            difference_sums, _ = codebook_gradient_op(x, codebook, indices, ctx.backend)
            grad_codebook = (scale * difference_sums).to(codebook.dtype)
        return grad_x, grad_codebook, None, None
