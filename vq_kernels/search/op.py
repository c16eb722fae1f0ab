"""The search as one operator: its schema, its fake, and the way to a backend. Needs torch alone."""

import torch
from torch import Tensor

from vq_kernels.search import onnx_export
from vq_kernels.search.backend import choose_backend, has_float64
from vq_kernels.search.prepared import backend_module


@torch.library.custom_op("vq_kernels::nearest_code", mutates_args=())
def _operator(
    x: Tensor, codebook: Tensor, operands: list[Tensor], backend: str, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [N, D], codebook [K, D], operands of the backend (or none) -> indices, codes, sq_distances, statistics."""
    if not has_float64(x.device):
        found = _operator(x.cpu(), codebook.cpu(), [operand.cpu() for operand in operands], backend, precision)
        indices, codes, sq_distances, statistics = (result.to(x.device) for result in found)
        return indices, codes, sq_distances, statistics
    name, _ = choose_backend(x, codebook, backend)
    indices, codes, sq_distances, statistics = backend_module(name).search(x, codebook, operands, precision)
    return indices, codes, sq_distances, statistics


@_operator.register_fake
def _(
    x: Tensor, codebook: Tensor, operands: list[Tensor], backend: str, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows = x.shape[0]
    return (
        x.new_empty(num_rows, dtype=torch.int64),
        x.new_empty(x.shape),
        x.new_empty(num_rows, dtype=torch.float32),
        x.new_empty(3, dtype=torch.int64),
    )


def nearest_code_op(
    x: Tensor, codebook: Tensor, operands: list[Tensor], backend: str, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator, and what takes its place while a module is exported to ONNX; arguments and results are its own."""
    if torch.onnx.is_in_onnx_export():
        return onnx_export.search(x, codebook)
    indices, codes, sq_distances, statistics = _operator(x, codebook, operands, backend, precision)
    return indices, codes, sq_distances, statistics
