"""The codebook's gradient as one operator: its schema, its fake, and the way to a backend. Needs torch alone."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vq_kernels.gradient import torch_gradient
from vq_kernels.search.backend import choose_backend, has_float64


@torch.library.custom_op("vq_kernels::codebook_gradient", mutates_args=())
def codebook_gradient_op(x: Tensor, codebook: Tensor, indices: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """x [N, D], codebook [K, D], indices [N] -> the sums of (code - row) [K, D], and counts [K] int64."""
    if not has_float64(x.device):
        sums, counts = codebook_gradient_op(x.cpu(), codebook.cpu(), indices.cpu(), backend)
        return sums.to(x.device), counts.to(x.device)
    name, _ = choose_backend(x, codebook, backend)
    deterministic = x.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    if name == "triton":
        triton_gradient = import_module("vq_kernels.gradient.triton_gradient")  # on first use
        sums, counts = triton_gradient.codebook_gradient(x, codebook, indices, deterministic)
        return sums, counts
    return torch_gradient.codebook_gradient(x, codebook, indices, deterministic)


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
