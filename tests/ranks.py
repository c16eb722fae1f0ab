"""Runs a function in several processes, the ranks of a group."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing


def run_ranks(run: Callable[..., None], folder: Path, *arguments: Any, world: int = 2) -> list[Any]:
    """What run(rank, *arguments, folder) saves as folder/<rank>.pt, in each of `world` processes.

    They are forked from a server that has imported torch, with the environment that it was started in. A process has
    one such server, which benchmarks/gpu.py uses too, so it imports what that needs.
    """
    multiprocessing.set_forkserver_preload(["benchmarks.gpu"])
    of_ranks = (*arguments, str(folder))
    torch.multiprocessing.start_processes(run, of_ranks, nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]
