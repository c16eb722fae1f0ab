"""Kernels compiled side by side, ahead of their use: one after the other they would take most of a stage's time.

Each process makes small searches with the plans of the real ones, and so fills the cache on disk that all stages share.
"""

import functools
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from child_processes import killed_with_parent

from gpu.stage import Context
from vq_kernels.search.triton.launch import device_properties, search_with_plan
from vq_kernels.search.triton.plan import ScanConfig, pick_config, plan_search

_PROCESSES = 10
_ROWS = 256  # of the small searches
_MOST_OF_IT = 0.6  # of the time that is left; what is not compiled by then is compiled in use


@dataclass(frozen=True)
class Case:
    """A float32 search whose kernels are to be compiled.

    Attributes:
        shape: N, K, D, which decide its plan.
        config: tiles other than those that `pick_config` gives.
    """

    shape: tuple[int, int, int]
    config: ScanConfig | None = None


def precompile(cases: Sequence[Case], context: Context) -> None:
    """Compile the kernels of all cases; nothing to do where they are interpreted. What fails will fail again in use."""
    if context.rehearse:
        for case in cases[:1]:
            compile_case(case, context.device)
        return
    pool, all_done = processes(), False
    try:
        futures = [pool.submit(compile_case, case, context.device) for case in cases]
        all_done = not wait(futures, timeout=max(_MOST_OF_IT * context.left_s(), 0.0)).not_done
    finally:
        if not all_done:
            end_pool(pool)
            processes.cache_clear()


@functools.cache
def processes() -> ProcessPoolExecutor:
    """Made once, since each process takes seconds to start."""
    return ProcessPoolExecutor(_PROCESSES, mp_context=get_context("spawn"), initializer=killed_with_parent)


def end_pool(pool: ProcessPoolExecutor) -> None:
    """End the processes of a pool, whatever they are doing."""
    processes = [*pool._processes.values()]  # no name of theirs is public before Python 3.14
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


def compile_case(case: Case, device: torch.device) -> None:
    """Search a few rows with a case's plan."""
    num_codes, code_dim = case.shape[1:]
    properties = device_properties(device)
    config = case.config or pick_config(*case.shape, torch.float32, properties)
    x = torch.randn(min(case.shape[0], _ROWS), code_dim, device=device)
    codebook = torch.randn(num_codes, code_dim, device=device)
    search_with_plan(x, codebook, [], "exact", plan_search(*case.shape, config, properties))
