"""Vector quantization with straight-through gradients."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vq_kernels.cosine import _missing_length, most_similar_code
from vq_kernels.gradient.autograd import Choice, pass_gradients
from vq_kernels.search.api import PreparedCodebook, nearest_code_op, unpacked
from vq_kernels.search.backend import Backend
from vq_kernels.search.topk import NearestCodes, nearest_code_topk
from vq_kernels.search.validation import check_pair

Metric = Literal["euclidean", "cosine"]
METRICS = ("euclidean", "cosine")


class Quantized(NamedTuple):
    """What quantization returns.

    Attributes:
        quantized: [..., D], each row's nearest code, in x's dtype.
        indices: [...], int64, in [0, K); where a module is given a mask, -1 for padding.
        loss: [], float32 (float64 for float64 input), the mean over all numbers of (x - code)²;
            with a commitment weight w, 1 + w times that.
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor


def vector_quantize(
    x: Tensor, codebook: Tensor | PreparedCodebook, *, commitment_weight: float = 0.0, backend: Backend = "auto"
) -> Quantized:
    """Replace each row of x by its nearest code, differentiably.

    With q the codes chosen, M = N·D numbers, and g the gradient that arrives at `quantized`:

    - x gets g, unchanged (straight-through), and nothing of the loss: it is MSE(x detached, q);
    - the codebook gets the gradient of `loss`, (2 / M)·Σ (c_k - x) over the rows of each code k, and nothing of g;
    - with a commitment_weight w, `loss` adds w·MSE(x, q detached), and x gets (2·w / M)·(x - q) more.

    Args:
        x: [..., D], float32, float16, bfloat16 or float64, any strides.
        codebook: [K, D], K >= 1, on x's device, its dtype may differ from x's; or a `PreparedCodebook`, whose copy of
            the codes gets no gradient.
        commitment_weight: w above, >= 0. The specification has none.
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


def choose(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: Metric = "euclidean",
    operands: Sequence[Tensor] = (),
    backend: Backend = "auto",
) -> Choice:
    """What one stage chooses for x [N, D] in codebook [K, D], neither with a gradient.

    Args:
        x: unit vectors, if the metric is "cosine".
        codebook: likewise.
        metric: "euclidean", the nearest code; "cosine", the one with the largest dot product.
        operands: what the backend has prepared of the codebook, for "euclidean"; or nothing.
        backend: as for `nearest_code`.
    """
    if metric == "cosine":
        found = most_similar_code(x, codebook, backend=backend)
        indices, codes = found.indices, found.codes
    else:
        indices, codes, sq_distances, _ = nearest_code_op(x, codebook, list(operands), backend, "exact")
    if metric == "cosine" or torch.float64 in (x.dtype, codebook.dtype):  # the operator's sq_distances are float32
        sq_distances = (x - codebook[indices]).square().sum(dim=1)
    return Choice(indices[None], codes, sq_distances[None])


def choose_topk(x: Tensor, codebook: Tensor, k: int, *, metric: Metric = "euclidean") -> NearestCodes:
    """The k best codes for x [N, D] in codebook [K, D], the best first, and their distances; arguments as for `choose`.

    By the dot product they are the nearest ones once codes have coordinates that bring them all to one length, see
    `most_similar_code`. Of equal dot products either may come first.
    """
    if metric == "euclidean":
        return nearest_code_topk(x, codebook, k)
    lengthened = torch.cat([codebook, _missing_length(codebook)], dim=1)
    indices = nearest_code_topk(F.pad(x, (0, lengthened.shape[1] - x.shape[1])), lengthened, k).indices
    rank_distances = [(x - codebook[rank]).square().sum(dim=1) for rank in indices.unbind(-1)]
    return NearestCodes(indices, torch.stack(rank_distances, dim=-1).float())
