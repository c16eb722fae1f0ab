"""Checks of the tensors of a call, and the projections, shared by the compatibility modules."""

import sys

import torch
from torch import Tensor, nn

from vq_kernels.modules.indices import check_mask


def position_mask(mask: Tensor | None, lens: Tensor | None, leading: torch.Size) -> Tensor | None:
    """Returns the mask [*leading] bool of a call, or None; `leading` is the shape of x without channels.

    Raises:
        TypeError, ValueError: mask or lens does not fit, or both are given.
    """
    if lens is not None:
        if mask is not None:
            raise ValueError("mask and lens must not both be given")
        if len(leading) != 2 or lens.shape != leading[:1]:
            raise ValueError(f"lens must be [b] for sequences [b, n], got {tuple(lens.shape)} for {tuple(leading)}")
        return torch.arange(leading[1], device=lens.device) < lens[:, None]
    if mask is not None:
        check_mask(mask, leading)
    return mask


def check_targets(targets: Tensor, leading: torch.Size, heads: int) -> None:
    """Raises TypeError or ValueError unless `targets` is int64 and [*leading], or [*leading, heads].

    Leading dimensions may be flattened to [b, n], as vector_quantize_pytorch requires for images.
    """
    if targets.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {targets.dtype}")
    ends = (heads,) if heads > 1 else ()
    if targets.shape not in ((*leading, *ends), (leading[0], leading[1:].numel(), *ends)):
        raise ValueError(f"indices must be {(*leading, *ends)} to match x, got {tuple(targets.shape)}")


def projections(dim: int, inner_dim: int, layernorm: bool) -> tuple[nn.Module, nn.Module]:
    """Returns the projections from `dim` channels to `inner_dim` and back; identities if they are equal."""
    if inner_dim == dim:
        return nn.Identity(), nn.Identity()
    project_in: nn.Module = nn.Linear(dim, inner_dim)
    if layernorm:
        project_in = nn.Sequential(project_in, nn.LayerNorm(inner_dim))
    return project_in, nn.Linear(inner_dim, dim)


def register_in_sequential(module_class: type[nn.Module]) -> None:
    """Lets vector_quantize_pytorch's `Sequential` accept the class as a quantizer, if that package is imported."""
    theirs = sys.modules.get("vector_quantize_pytorch.utils")
    known = getattr(theirs, "QUANTIZE_KLASSES", (module_class,))
    if theirs is not None and module_class not in known:
        theirs.__dict__["QUANTIZE_KLASSES"] = (*known, module_class)
