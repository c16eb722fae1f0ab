"""The indices and masks that quantizers take: their checks, and the codes at indices."""

import torch
from torch import Tensor

from vq_kernels.gradient.autograd import LEFT_OUT
from vq_kernels.search.validation import check_tensor

INDEX_DTYPES = tuple(getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))


def check_mask(mask: Tensor, shape: torch.Size) -> None:
    """Raises TypeError or ValueError unless `mask` is bool and has this shape."""
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"mask must be {tuple(shape)} to match x, got {tuple(mask.shape)}")


def checked_indices(indices: Tensor, num_codes: int) -> Tensor:
    """Returns indices as int64. Raises TypeError for other dtypes than integers, ValueError out of range.

    The range is checked on the CPU alone, and not in a captured graph, because reading values waits for the device.
    """
    if indices.dtype not in INDEX_DTYPES:
        raise TypeError(f"indices must have an integer dtype, got {indices.dtype}")
    wide = indices.long()
    if indices.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = wide[(wide < LEFT_OUT) | (wide >= num_codes)]
        if outside.numel():
            raise ValueError(f"indices must be in [0, {num_codes}), or -1 for padding, got {outside[0]}")
    return wide


def codes_at(codebook: Tensor, indices: Tensor) -> Tensor:
    """Returns the codes [..., D] of codebook [K, D] at indices [...]; 0 at LEFT_OUT. Raises as `checked_indices`."""
    chosen = checked_indices(indices, codebook.shape[0])
    left_out = chosen == LEFT_OUT
    codes = codebook.index_select(0, chosen.masked_fill(left_out, 0).flatten())
    return codes.view(*indices.shape, codebook.shape[1]).masked_fill(left_out[..., None], 0)
