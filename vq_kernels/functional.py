"""Quantization as a function: exact search with straight-through gradients."""

from typing import NamedTuple

from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from vq_kernels.gradient.autograd import choose, pass_gradients
from vq_kernels.search.api import PreparedCodebook, nearest_code, unpacked
from vq_kernels.search.backend import Backend
from vq_kernels.search.topk import nearest_code_topk
from vq_kernels.search.validation import check_pair

__all__ = ["Quantized", "nearest_code", "nearest_code_topk", "vector_quantize"]


class Quantized(NamedTuple):
    """The result of quantization.

    Attributes:
        quantized: [..., D], the nearest code of each row, in x's dtype.
        indices: [...], int64, in [0, K); -1 for padding, if a module is given a mask.
        loss: [], float32 (float64 for float64 input), the mean of (x - code)² over all elements, times 1 + w with a
            commitment weight w; times w from a module whose codes follow moving averages.
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor


_register_namedtuple(Quantized, serialized_type_name="vq_kernels.Quantized")  # for torch.export.save


def vector_quantize(
    x: Tensor, codebook: Tensor | PreparedCodebook, *, commitment_weight: float = 0.0, backend: Backend = "auto"
) -> Quantized:
    """Replaces each row of x by its nearest code, with gradients.

    With q the chosen codes, M = N·D, and g the gradient with respect to `quantized`:

    - x gets g unchanged (straight-through) and no gradient of the loss, which is MSE(x detached, q);
    - the codebook gets the gradient of `loss`, (2 / M)·Σ (c_k - x) over the rows of each code k, and no part of g;
    - a commitment_weight w adds w·MSE(x, q detached) to `loss`, and (2·w / M)·(x - q) to the gradient of x.

    Args:
        x: [..., D], float32, float16, bfloat16 or float64, any strides.
        codebook: [K, D], K >= 1, on x's device; its dtype may differ from x's. A `PreparedCodebook` gets no gradient.
        commitment_weight: w above, >= 0.
        backend: as for `nearest_code`.

    Returns:
        Quantized(quantized [..., D] in x's dtype, indices [...] int64, loss []). The loss of no rows is 0.

    Raises:
        TypeError, ValueError, RuntimeError: as for `nearest_code`; ValueError for a negative commitment_weight.

    Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 3.
    """
    codes, operands, backend = unpacked(codebook, backend)
    check_pair(x, codes)
    if not commitment_weight >= 0:
        raise ValueError(f"commitment_weight must be >= 0, got {commitment_weight}")
    rows = x.reshape(-1, x.shape[-1])
    choice = choose(rows.detach(), codes.detach(), operands=operands, backend=backend)
    quantized, loss = pass_gradients(
        rows, codes[None], choice, commitment_weight=float(commitment_weight), complete=True, backend=backend
    )
    return Quantized(quantized.view(x.shape), choice.indices.view(x.shape[:-1]), loss)
