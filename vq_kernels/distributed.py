"""Collectives for the processes of a distributed job, and the detection of codes that a module does not hold itself.

Without a process group, collectives act on one rank. A module writes in vain to codes that are shards of FSDP or of
another DTensor, or that a parametrization recomputes from other tensors.
"""

import torch.distributed
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

_LOST = "because codes that are initialised from data, reset or set would be lost"
_LEAVE_OUT = (
    "leave the quantizer out of sharding: fully_shard(model, ignored_params=set(quantizer.parameters())), or "
    "FullyShardedDataParallel(model, ignored_modules=[quantizer]); or use moving averages, whose codes are not sharded"
)
_BY_GRADIENTS = "this works only for codes that learn by gradients alone, without initialisation from data or resets"


def rank_and_world(synchronise: bool) -> tuple[int, int]:
    """Returns this process's rank and the world size, or (0, 1) without a process group or if `synchronise` is False.

    The process group may be created after the module.
    """
    if synchronise and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def sum_over_ranks(tensor: Tensor, synchronise: bool) -> Tensor:
    """Returns the sum of `tensor`, of equal shape on all ranks; with one rank, the tensor itself."""
    if rank_and_world(synchronise)[1] == 1:
        return tensor
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total


def is_dtensor(tensor: object) -> bool:
    """Returns whether this is a DTensor, without importing its module."""
    return hasattr(tensor, "device_mesh")


def check_whole(name: str, codes: Tensor, sizes: tuple[int, int]) -> None:
    """Raises RuntimeError unless `codes` is a plain tensor [..., *sizes]."""
    if _is_shard(codes, sizes):
        raise RuntimeError(
            f"{name} must be a plain tensor of {sizes[0]} codes of dimension {sizes[1]}, got a "
            f"{type(codes).__name__} {tuple(codes.shape)}; call the module in the forward pass of the sharded model, "
            f"or {_LEAVE_OUT}"
        )


def check_owned(module: nn.Module, name: str, sizes: tuple[int, int], was_sharded: bool) -> None:
    """Raises RuntimeError unless a write to attribute `name` of the module changes its codes for good.

    Args:
        module: the codebook.
        name: the name of its codes, [..., *sizes].
        sizes: K and D.
        was_sharded: whether a DTensor has been assigned to the codes.
    """
    if is_parametrized(module, name):
        raise RuntimeError(f"{name} must not have a parametrization, {_LOST}; {_BY_GRADIENTS}")
    is_managed = getattr(module, "_is_fsdp_managed_module", False)
    replaced = name in module.__dict__  # FSDP1, pruning and weight_norm set a plain tensor in place of the Parameter
    if _is_shard(getattr(module, name), sizes) or (is_managed and (was_sharded or replaced)):
        raise RuntimeError(f"{name} must not be sharded, {_LOST}; {_LEAVE_OUT}")
    if replaced:
        raise RuntimeError(f"{name} must not be computed from other tensors, {_LOST}; {_BY_GRADIENTS}")


def _is_shard(codes: Tensor, sizes: tuple[int, int]) -> bool:
    """Returns whether `codes` is a DTensor, or flattened as FSDP1 does outside of the forward pass."""
    return is_dtensor(codes) or codes.shape[-2:] != sizes
