"""Detects recomputation under activation checkpointing, so that a batch updates the codebook once.

Checkpointing runs the forward pass of a batch again inside the backward, when the codebook may have changed. The
recomputed pass must search the codes that the original pass searched, and must not learn. A captured graph cannot
branch on this: it may run as the original, as the recomputation, or in parts that the compiler moved into the
backward. It therefore asks through operators, at run time.
"""

import torch
from torch import Tensor

from vq_kernels.search.operators import WAITS


def is_recomputing() -> bool:
    """Returns whether a backward pass is running. False while a graph is being captured."""
    return not torch.compiler.is_compiling() and _in_backward()


def is_readable(tensor: Tensor) -> bool:
    """Returns whether the host can read the tensor without waiting for a device. False while a graph is captured."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def unless_recomputing(condition: Tensor) -> Tensor:
    """Returns `condition` [...] bool, or all False in a recomputation. Works in captured graphs."""
    if torch.compiler.is_compiling():
        is_original: Tensor = is_original_op(condition)
        return condition & is_original
    return condition & (not _in_backward())


# A replayed CUDA graph would not ask, so these operators split CUDA graphs too.
@torch.library.custom_op("vq_kernels::is_original", mutates_args=(), tags=WAITS)
def is_original_op(like: Tensor) -> Tensor:
    """Returns [] bool on the device of `like`: false in a recomputation."""
    return torch.full((), not _in_backward(), device=like.device)


@is_original_op.register_fake
def _(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.bool)


NUM_SAMPLES = 64
"""The rows of a batch by which a recomputation recognises it."""


def sample_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Returns evenly spaced rows of [M, D] in the shape and dtype of `like` [NUM_SAMPLES, D]; 0 if there are none."""
    if rows.shape[0] == 0:
        return torch.zeros_like(like)
    return rows[torch.arange(NUM_SAMPLES, device=rows.device) * rows.shape[0] // NUM_SAMPLES].to(like.dtype)


@torch.library.custom_op("vq_kernels::copy_to_search", mutates_args=(), tags=WAITS)
def copy_to_search(
    codebook: Tensor, last_searched: Tensor, samples: Tensor, last_samples: Tensor
) -> tuple[Tensor, Tensor]:
    """Copies the codes to search, [..., K, D]: `codebook`, or in a recomputation `last_searched`.

    An operator, so that no compiler replaces the copy by its source, which changes before the backward.

    Args:
        codebook: [..., K, D], the current codes.
        last_searched: [..., K, D], the codes that the last original forward pass searched.
        samples: [NUM_SAMPLES, D], rows of this batch.
        last_samples: [NUM_SAMPLES, D], rows of the batch of that pass.

    Returns:
        The codes, and the samples of the last original forward pass.

    Raises:
        RuntimeError: a recomputation of another batch than the last one, whose codes are gone.
    """
    if not _in_backward():
        return codebook.clone(memory_format=torch.contiguous_format), samples.clone()
    if (samples - last_samples).norm() > 1e-3 * last_samples.norm():  # a recomputation may round differently
        raise RuntimeError(
            "the batch that activation checkpointing recomputes must be that of the last forward pass, because the "
            "codebook has changed since; run the backward pass of a batch before the next forward pass, or call the "
            "quantizer outside of the checkpointed function"
        )
    return last_searched.clone(memory_format=torch.contiguous_format), last_samples.clone()


@copy_to_search.register_fake
def _(codebook: Tensor, last_searched: Tensor, samples: Tensor, last_samples: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(codebook, memory_format=torch.contiguous_format), torch.empty_like(samples)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
