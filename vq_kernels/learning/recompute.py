"""Which forward pass of a batch is running: the first, or the second that gradient checkpointing makes of it.

A batch is learned from in its first pass. The second one runs inside the backward, when the codebook has moved on: it
has to find the codes that the first one searched. A captured graph cannot branch on that, and may be both: run again as
a whole, or in parts that its compiler puts into the backward. So it asks by operators, as it runs.
"""

import torch
from torch import Tensor


def is_second_pass() -> bool:
    """Whether a backward is running. A graph that is being captured does not know yet: False."""
    return not torch.compiler.is_compiling() and _in_backward()


def unless_second_pass(condition: Tensor) -> Tensor:
    """condition [...] bool in a first pass, False in a second, in captured graphs too."""
    if torch.compiler.is_compiling():
        in_first: Tensor = first_pass_op(condition)
        return condition & in_first
    return condition & (not _in_backward())


def of_first_pass(new: Tensor, held: Tensor) -> Tensor:
    """What a tensor that holds `held` is to hold: `new`, of its shape; in a second pass, what it holds."""
    if torch.compiler.is_compiling():
        return torch.where(first_pass_op(held), new, held)
    return held if _in_backward() else new


# Where a CUDA graph is replayed, nothing is asked: such graphs are to end before these operators.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("vq_kernels::first_pass", mutates_args=(), tags=_TAGS)
def first_pass_op(like: Tensor) -> Tensor:
    """[] bool, on the device of `like`: whether this is a first pass."""
    return torch.full((), not _in_backward(), device=like.device)


@first_pass_op.register_fake
def _(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.bool)


@torch.library.custom_op("vq_kernels::copy_to_search", mutates_args=(), tags=_TAGS)
def copy_to_search(codebook: Tensor, last_searched: Tensor) -> Tensor:
    """A copy of the codes to search, [..., K, D]: those of the codebook; in a second pass, those of the first.

    An operator, so that no compiler takes the copy for its source, which changes before the backward.

    Args:
        codebook: [..., K, D].
        last_searched: likewise, what the last first pass searched.
    """
    return (last_searched if _in_backward() else codebook).clone(memory_format=torch.contiguous_format)


@copy_to_search.register_fake
def _(codebook: Tensor, last_searched: Tensor) -> Tensor:
    return torch.empty_like(codebook, memory_format=torch.contiguous_format)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
