"""Defines operators, which torch.compile and torch.export capture as they are."""

from collections.abc import Callable
from typing import Any

import torch

from vq_kernels.search.vmap import register_vmap

# Tags of an operator that waits for the device: torch.compile splits CUDA graphs at it.
WAITS = (torch.Tag.cudagraph_unsafe,)
_LIBRARY: Any = torch.library.Library("vq_kernels", "FRAGMENT")  # type: ignore[no-untyped-call]


def define_operator(
    name: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    num_row_outputs: int = 0,
    waits: bool = False,
) -> Callable[..., Any]:
    """Define the operator `vq_kernels::name` for all devices. It has no gradient and changes no argument.

    It is called by PyTorch's dispatcher at once. `torch.library.custom_op` puts several Python functions in between,
    which take longer than a small search.

    Args:
        name: its name.
        function: what it computes, with annotations, from which its schema is inferred.
        fake: likewise for tensors without data, whose results have the right shapes and dtypes.
        num_row_outputs: as for `register_vmap`.
        waits: the function may wait for the device, so a CUDA graph cannot capture it.

    Returns:
        What to call.
    """
    schema = torch.library.infer_schema(function, mutates_args=(), op_name=name)
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *(WAITS if waits else ())))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vq_kernels::{name}", fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.vq_kernels, name).default
    register_vmap(operator, num_row_outputs)
    return operator
