"""Checks of the arguments of a call, shared by the compatibility modules."""

import sys

import torch
from torch import Tensor, nn


def check_targets(targets: Tensor, leading: torch.Size, heads: int) -> None:
    """Raises TypeError or ValueError unless `targets` is int64 and [*leading], or [*leading, heads].

    Leading dimensions may be flattened to [b, n], as vector_quantize_pytorch requires for images.
    """
    if targets.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {targets.dtype}")
    ends = (heads,) if heads > 1 else ()
    if targets.shape not in ((*leading, *ends), (leading[0], leading[1:].numel(), *ends)):
        raise ValueError(f"indices must be {(*leading, *ends)} to match x, got {tuple(targets.shape)}")


def check_topk(topk: int, heads: int, indices: Tensor | None) -> None:
    """Raises ValueError unless so many codes can be returned."""
    if topk < 1:
        raise ValueError(f"topk must be >= 1, got {topk}")
    if heads > 1:
        raise ValueError(f"topk needs heads=1, got {heads}")
    if indices is not None:
        raise ValueError("topk and indices must not both be given")


def register_in_sequential(module_class: type[nn.Module]) -> None:
    """Lets vector_quantize_pytorch's `Sequential` accept the class as a quantizer, if that package is imported."""
    theirs = sys.modules.get("vector_quantize_pytorch.utils")
    known = getattr(theirs, "QUANTIZE_KLASSES", (module_class,))
    if theirs is not None and module_class not in known:
        theirs.__dict__["QUANTIZE_KLASSES"] = (*known, module_class)
