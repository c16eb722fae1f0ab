"""Runs a function in several processes, the ranks of a group."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing


def run_ranks(run: Callable[..., None], folder: Path, *arguments: Any, world: int = 2) -> list[Any]:
    """What run(rank, *arguments, folder) saves as folder/<rank>.pt, in each of `world` processes.

    They are forked from a process that has imported torch.
    """
    multiprocessing.set_forkserver_preload(["torch", "torchvision"])
    of_ranks = (*arguments, str(folder))
    torch.multiprocessing.start_processes(run, of_ranks, nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]
