"""The reference: every distance in float64, by direct differences. Slow, obvious, and what "exact" means here."""

import torch
from torch import Tensor

# Of the [rows, K] distances held at a time: on a CPU they stay in a core's caches, a GPU needs work for each launch.
_BUFFER_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}


def brute_force_nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest code of each row, by float64 brute force; the lowest index on a tie.

    Args:
        x: [N, D], any floating dtype. A row holding NaN or Inf gets index 0.
        codebook: [K, D], any floating dtype. A code holding NaN or Inf is never chosen unless there is no finite one.

    Returns:
        indices [N], int64.
    """
    wide_codes = codebook.double()
    numbers = torch.arange(codebook.shape[0], device=x.device)
    unusable = ~wide_codes.isfinite().all(dim=1)  # [K]
    indices = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    rows = max(1, _BUFFER_ELEMENTS.get(x.device.type, 1 << 18) // codebook.shape[0])
    for start in range(0, x.shape[0], rows):
        block = x[start : start + rows].double()
        distances = torch.zeros(block.shape[0], codebook.shape[0], dtype=torch.float64, device=x.device)
        for d in range(x.shape[1]):  # one dimension at a time: no [rows, K, D]
            distances += (block[:, d, None] - wide_codes[None, :, d]).square_()
        distances.masked_fill_(unusable, torch.inf)
        least = distances.amin(dim=1, keepdim=True)
        first = torch.where(distances == least, numbers, codebook.shape[0]).amin(dim=1)
        indices[start : start + rows] = torch.where(block.isfinite().all(dim=1), first, 0)
    return indices
