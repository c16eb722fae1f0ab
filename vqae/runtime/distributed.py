"""Several processes as one: their group, their shares of a batch, and what they agree on.

In a process alone every function here does nothing, or what its argument does.
"""

import inspect
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.nn.parallel import DistributedDataParallel

from vq_kernels.distributed import rank_and_world
from vqae.config import find_device
from vqae.runtime.errors import LostProcessError, UsageError
from vqae.runtime.process import Interrupted, Launch, SignalHandler

T = TypeVar("T")


def world_size() -> int:
    """How many processes train together; 1 for a process alone."""
    return rank_and_world(synchronise=True)[1]


def is_rank0() -> bool:
    """Whether this is rank 0, the one that writes and prints."""
    return rank_and_world(synchronise=True)[0] == 0


# -- the group


@contextmanager
def process_group(device_name: str) -> Iterator[torch.device]:
    """The group of the processes that torchrun started, gloo for the CPU and NCCL for GPUs, and this one's device.

    A process alone gets its device and no group.

    Args:
        device_name: --device; where it names no single GPU, each process takes the one of its local rank.

    Raises:
        UsageError: the device or a backend is not there, or the processes do not find each other.
        LostProcessError: inside, another process went away.
    """
    launch = Launch.from_environment()
    if launch.world_size == 1:
        yield find_device(device_name)
        return
    device = _own_device(device_name, launch)
    _join(device, launch)
    try:
        yield device
    except RuntimeError as error:
        if _is_of_connection(error):
            raise LostProcessError(f"rank {launch.rank} of {launch.world_size} lost another process") from error
        raise
    torch.distributed.destroy_process_group()


def _own_device(name: str, launch: Launch) -> torch.device:
    device = find_device(name)
    if device.type == "cpu":
        return device
    index: int | None = device.index
    if index is not None and launch.local_world_size > 1:
        raise UsageError(
            f"--device {name} is one GPU for {launch.local_world_size} processes: give --device cuda, for one each"
        )
    if index is None:
        num_gpus = torch.cuda.device_count()
        if launch.local_world_size > num_gpus:
            raise UsageError(
                f"{launch.local_world_size} processes need a GPU each, but this machine has {num_gpus}: give "
                f"--nproc-per-node {num_gpus}, or --device cpu"
            )
        device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device


def _join(device: torch.device, launch: Launch) -> None:
    """Make the default process group. GPUs get gloo as well: what the hosts agree on does not wait for a GPU."""
    distributed = torch.distributed
    there = {
        "gloo": distributed.is_available() and distributed.is_gloo_available(),
        "nccl": distributed.is_available() and distributed.is_nccl_available(),
    }
    missing = [name for name in (("gloo",) if device.type == "cpu" else ("gloo", "nccl")) if not there[name]]
    if missing:
        raise UsageError(f"{launch.world_size} processes need {' and '.join(missing)}, which this torch does not have")
    # Here, since they cannot be imported where torch was built without them.
    from torch.distributed.rendezvous import rendezvous

    rank, size, backend = launch.rank, launch.world_size, "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        store = next(rendezvous("env://", rank, size))[0]
        distributed.init_process_group(
            backend, store=store_of_this_attempt(store, rank, size), rank=rank, world_size=size
        )
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0]
        raise UsageError(f"the {launch.world_size} processes do not find each other at {where}: {reason}") from None


def _is_of_connection(error: RuntimeError) -> bool:
    """Whether it tells of a process that is gone, rather than of this one's own failure."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as DistributedDataParallel, which averages the processes' gradients; alone, the model itself."""
    if world_size() == 1:
        return model
    known = inspect.signature(DistributedDataParallel).parameters
    keyword = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its name before 2.14
    # Buffers agree by themselves: all of them are made from the batch of all processes.
    options: dict[str, Any] = {keyword: False, "device_ids": [device] if device.type == "cuda" else None}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **options)


# -- agreement


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, in all of them; a UsageError there is raised in all."""
    if world_size() == 1:
        return make()
    shared = [_tried(make) if is_rank0() else None]
    torch.distributed.broadcast_object_list(shared, src=0, device=torch.device("cpu"))
    result, complaint = cast(tuple[T, str | None], shared[0])
    if complaint is not None:
        raise UsageError(complaint)
    return result


def on_all_ranks(make: Callable[[], T]) -> T:
    """What `make` returns in this process, once it has returned in all; a UsageError of one is raised in all."""
    if world_size() == 1:
        return make()
    result, complaint = _tried(make)
    for heard in _from_all(complaint):
        if heard is not None:
            raise UsageError(heard)
    return cast(T, result)


def local_rank0_first(read: Callable[[], T], *, may_download: bool) -> T:
    """`on_all_ranks`, but if `read` may download, local rank 0 of each machine reads first."""
    first = not may_download or Launch.from_environment().local_rank == 0
    found = on_all_ranks(lambda: read() if first else None)
    return on_all_ranks(lambda: read() if found is None else found)


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    return any(_from_all(flag))


def check_same(what: str, value: object) -> None:
    """Raise UsageError, in all processes, where the value is not the same in all of them."""
    values = _from_all(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise UsageError(f"{what} must be the same in all processes, got {values[0]} on rank 0, {other} on {rank}")


def barrier() -> None:
    """Return once all processes have come here."""
    _from_all(None)


def _tried(make: Callable[[], T]) -> tuple[T | None, str | None]:
    """What `make` returns, or the message of its UsageError."""
    try:
        return make(), None
    except UsageError as error:
        return None, str(error)


def _from_all(value: T) -> list[T]:
    """Every process's value, by rank."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return cast(list[T], values)


class Agreement:
    """The same decisions in all processes: whether a signal came, and how late it is.

    Args:
        signals: this process's.
    """

    def __init__(self, signals: SignalHandler) -> None:
        self._signals = signals
        self._signal = 0  # as of the last `exchange`

    def exchange(self, time_share: float) -> float:
        """The largest of all processes' `time_share`; takes note of their signals. Every process has to ask."""
        if world_size() == 1:
            return time_share
        heard: Tensor = torch.tensor([time_share, self._signals.received], dtype=torch.float64)
        torch.distributed.all_reduce(heard, torch.distributed.ReduceOp.MAX)
        self._signal = int(heard[1])
        return heard[0].item()

    def poll(self) -> None:
        """Raise `Interrupted` if a signal has come: to any process before the last `exchange`; alone, before now."""
        if world_size() == 1:
            self._signals.poll()
        elif self._signal:
            raise Interrupted(self._signal)


PATIENCE = timedelta(minutes=5)
_POLL_S = 0.02


def store_of_this_attempt(store: Store, rank: int, world_size: int, patience: timedelta = PATIENCE) -> PrefixStore:
    """The part of a job's store that only those use who are alive now.

    Each process calls out a name that nobody had before. The first one answers each name with the name of this life,
    and goes on answering until each process has repeated that; who is dead does not.

    Args:
        store: of the job.
        rank: of this process, in [0, world_size).
        world_size: how many there are.
        patience: how long to wait for the others.

    Raises:
        RuntimeError: some process did not come in time.
    """
    name = uuid4().hex
    if rank:
        store.set(f"name/{rank}", name)
        store.wait([f"life/{name}"], patience)
        life = store.get(f"life/{name}").decode()
        store.set(f"heard/{life}/{rank}", "")
        return PrefixStore(life, store)
    missing, deadline = set(range(1, world_size)), time.monotonic() + patience.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"name/{other}"]):
                store.set(f"life/{store.get(f'name/{other}').decode()}", name)
        missing = {other for other in missing if not store.check([f"heard/{name}/{other}"])}
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"rank {', '.join(map(str, sorted(missing)))} did not come within {patience}")
        time.sleep(_POLL_S)
    return PrefixStore(name, store)
