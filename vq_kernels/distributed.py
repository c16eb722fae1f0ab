"""Collectives for the processes of a distributed job. Without a process group they act on one rank."""

import torch.distributed
from torch import Tensor


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
