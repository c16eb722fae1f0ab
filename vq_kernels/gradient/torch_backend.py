"""The gradient of the codebook in PyTorch, for any device."""

import torch
from torch import Tensor
from torch.nn import functional as F

_BUFFER_ELEMENTS = 1 << 20  # differences held at a time


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
