"""Rules of `torch.func.vmap` for the operators."""

from typing import Any

import torch
from torch import Tensor


def register_vmap(op: Any, num_row_outputs: int = 0) -> None:
    """Let `torch.func.vmap` call an operator, whose first argument is x [N, D], with the results of a loop.

    If vmap adds a dimension to x alone, all rows are searched at once. That needs outputs with one entry per row, the
    first num_row_outputs; the others are then those of all rows together.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], x: Tensor, *others: Any) -> tuple[Any, Any]:
        if num_row_outputs and not _is_batched(in_dims[1:]):
            rows = x.movedim(in_dims[0], 0)
            results = op(rows.flatten(0, 1), *others)
            each = [results] if isinstance(results, Tensor) else list(results)
            for i in range(num_row_outputs):
                each[i] = each[i].view(*rows.shape[:2], *each[i].shape[1:])
            dims = [0 if i < num_row_outputs else None for i in range(len(each))]
        else:
            calls = [op(*_select([x, *others], in_dims, i)) for i in range(info.batch_size)]
            results = calls[0]
            parts = [calls] if isinstance(results, Tensor) else zip(*calls, strict=True)
            each = [torch.stack(list(part)) for part in parts]
            dims = [0] * len(each)
        return (each[0], dims[0]) if isinstance(results, Tensor) else (tuple(each), tuple(dims))

    torch.library.register_vmap(op, rule)


def _is_batched(dim: Any) -> bool:
    return any(_is_batched(each) for each in dim) if isinstance(dim, (list, tuple)) else dim is not None


def _select(argument: Any, dim: Any, i: int) -> Any:
    """The i-th of the arguments that `dim` batches; lists are selected from element by element."""
    if isinstance(dim, (list, tuple)):
        return [_select(*each, i) for each in zip(argument, dim, strict=True)]
    return argument if dim is None else argument.select(dim, i)
