"""The codebook's gradient as one operator: its schema, its fake, and the way to a backend. Needs torch alone."""

from importlib import import_module

import torch
from torch import Tensor

from vq_kernels.gradient import torch_gradient
from vq_kernels.search.backend import select_backend


@torch.library.custom_op("vq_kernels::codebook_gradient", mutates_args=())
def codebook_gradient_op(x: Tensor, codebook: Tensor, indices: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """x [N, D], codebook [K, D], indices [N] -> the sums of (code - row) [K, D], and counts [K] int64."""
    name, _ = select_backend(x, codebook, backend)
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
