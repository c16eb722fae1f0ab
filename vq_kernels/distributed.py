"""What the processes of a distributed job agree on. Without a process group there is one rank, and nothing to do."""

import torch.distributed
from torch import Tensor


def rank_and_world(synchronise: bool) -> tuple[int, int]:
    """This process's rank and how many there are, asked for now: a group made after the layer counts.

    Args:
        synchronise: False: be alone, (0, 1), whatever there is.
    """
    if synchronise and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def sum_over_ranks(tensor: Tensor, synchronise: bool) -> Tensor:
    """The sum of every rank's `tensor`, of one shape on all; the tensor itself where there is one rank."""
    if rank_and_world(synchronise)[1] == 1:
        return tensor
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total
