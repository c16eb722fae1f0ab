"""Distributed training: the process group, the rendezvous, and agreement between ranks.

A single process has no process group, and the functions here return what they would for a group of one.
"""

import gc
import inspect
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.nn.parallel import DistributedDataParallel

from vq_kernels.distributed import rank_and_world
from vqae.config import find_device
from vqae.model.sync_batch_norm import SyncBatchNorm
from vqae.runtime.errors import LostProcessError, UsageError
from vqae.runtime.process import Launch

T = TypeVar("T")


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return rank_and_world(synchronise=True)[1]


def is_rank0() -> bool:
    """Whether this is rank 0, which writes and prints."""
    return rank_and_world(synchronise=True)[0] == 0


@contextmanager
def process_group(device_name: str) -> Iterator[torch.device]:
    """Join the process group of torchrun, gloo for the CPU and NCCL for GPUs, and yield this process's device.

    The group is destroyed after the block. Raises UsageError if the device or a backend is not available or the
    processes do not find each other, and in the block LostProcessError if a collective fails because another process
    died. The group is then left as it is, because destroying it would wait for that process.
    """
    launch = Launch.from_environment()
    if launch.world_size == 1:
        yield find_device(device_name)
        return
    device = _own_device(device_name, launch)
    _join(device, launch)
    try:
        yield device
    except BaseException as error:
        text = str(error) if isinstance(error, RuntimeError) else ""
        if isinstance(error, torch.distributed.DistError) or "gloo" in text or "NCCL" in text:
            raise LostProcessError(f"rank {launch.rank} of {launch.world_size} lost another process") from error
        traceback.clear_frames(error.__traceback__)
        _leave()
        raise
    _leave()


def _leave() -> None:
    """Destroy the process group. The models in DistributedDataParallel, which use it, go first."""
    gc.collect()
    torch.distributed.destroy_process_group()


def _own_device(name: str, launch: Launch) -> torch.device:
    device = find_device(name)
    if device.type == "cpu":
        return device
    num_processes, num_gpus = launch.local_world_size, torch.cuda.device_count()
    if ":" in name and num_processes > 1:
        raise UsageError(f"--device {name} is one GPU for {num_processes} processes: use --device cuda for one each")
    if ":" not in name:
        if num_processes > num_gpus:
            raise UsageError(
                f"{num_processes} processes need a GPU each, but this machine has {num_gpus}: use "
                f"--nproc-per-node {num_gpus} or --device cpu"
            )
        device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device


def _join(device: torch.device, launch: Launch) -> None:
    """Initialise the default process group. GPUs get gloo as well, so that agreement between hosts needs no GPU."""
    distributed = torch.distributed
    gloo = distributed.is_available() and distributed.is_gloo_available()
    nccl = device.type == "cpu" or (distributed.is_available() and distributed.is_nccl_available())
    missing = [name for name, available in (("gloo", gloo), ("nccl", nccl)) if not available]
    if missing:
        raise UsageError(f"{launch.world_size} processes need {' and '.join(missing)}, which this torch does not have")
    from torch.distributed.rendezvous import rendezvous  # fails if torch was built without distributed

    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        store = next(rendezvous("env://", launch.rank, launch.world_size))[0]
        store = attempt_store(store, launch.rank, launch.world_size)
        distributed.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0]
        raise UsageError(f"the {launch.world_size} processes cannot reach each other at {address}: {reason}") from None


def attempt_store(store: Store, rank: int, world_size: int, timeout: timedelta = timedelta(minutes=5)) -> PrefixStore:
    """The part of a job's store that belongs to this restart attempt.

    torchrun keeps the store when it restarts a job, so it still holds the keys of dead processes. Every rank announces
    a fresh name. Rank 0 answers each announced name with the name of the attempt, until every rank has confirmed it.
    Dead processes never confirm. Raises RuntimeError if a rank does not arrive in time.
    """
    name = uuid4().hex
    if rank:
        store.set(f"name/{rank}", name)
        store.wait([f"attempt/{name}"], timeout)
        attempt = store.get(f"attempt/{name}").decode()
        store.set(f"confirmed/{attempt}/{rank}", "")
        return PrefixStore(attempt, store)
    missing, deadline = set(range(1, world_size)), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"name/{other}"]):
                store.set(f"attempt/{store.get(f'name/{other}').decode()}", name)
        missing = {other for other in missing if not store.check([f"confirmed/{name}/{other}"])}
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"rank {', '.join(map(str, sorted(missing)))} did not arrive within {timeout}")
        time.sleep(0.02)
    return PrefixStore(name, store)


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap the model in DistributedDataParallel, with SyncBatchNorm. A single process gets the model itself."""
    if world_size() == 1:
        return model
    SyncBatchNorm.convert(model)
    known = inspect.signature(DistributedDataParallel).parameters
    keyword = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch < 2.14
    # No broadcast of buffers: every rank computes the same ones, from the whole batch.
    options: dict[str, Any] = {keyword: False, "device_ids": [device] if device.type == "cuda" else None}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **options)


# -- agreement


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 and return its result on all ranks. A UsageError is raised on all ranks too."""
    if world_size() == 1:
        return make()
    shared = [_try(make) if is_rank0() else None]
    torch.distributed.broadcast_object_list(shared, src=0, device=torch.device("cpu"))
    result, message = cast(tuple[T, str | None], shared[0])
    if message is not None:
        raise UsageError(message)
    return result


def on_all_ranks(make: Callable[[], T]) -> T:
    """Call `make` on every rank and return this rank's result. A UsageError of any rank is raised on all."""
    if world_size() == 1:
        return make()
    result, own_message = _try(make)
    for message in _gather(own_message):
        if message is not None:
            raise UsageError(message)
    return cast(T, result)


def local_rank0_first(read: Callable[[], T]) -> T:
    """`on_all_ranks`, but local rank 0 of each machine goes first, so that it downloads for the others."""
    found = on_all_ranks(lambda: read() if Launch.from_environment().local_rank == 0 else None)
    return on_all_ranks(lambda: read() if found is None else found)


def max_over_ranks(*values: float) -> list[float]:
    """The maximum of each value over all ranks."""
    if world_size() == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return largest.tolist()


def check_same(what: str, value: object) -> None:
    """Raise UsageError on all ranks if the value differs between ranks."""
    values = _gather(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise UsageError(f"{what} must be the same in all processes, got {values[0]} on rank 0, {other} on {rank}")


def _try(make: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result of `make`, and the message of its UsageError."""
    try:
        return make(), None
    except UsageError as error:
        return None, str(error)


def _gather(value: T) -> list[T]:
    """The values of all ranks."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return cast(list[T], values)
