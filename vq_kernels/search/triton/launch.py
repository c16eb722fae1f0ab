"""The Triton backend: prepare in two launches, scan, finish. No step waits for the device."""

import functools

import torch
from torch import Tensor

from vq_kernels.search.backend import Found
from vq_kernels.search.triton.common import Outputs, device_of
from vq_kernels.search.triton.plan import DeviceProperties, SearchPlan, pick_config, plan_search
from vq_kernels.search.triton.prepare import TritonCodebook, launch_prepare
from vq_kernels.search.triton.rerank import launch_finish
from vq_kernels.search.triton.scan import launch_scan


@functools.cache
def device_properties(device: torch.device) -> DeviceProperties:
    """What `pick_config` needs to know of a device. The CPU, for the interpreter, counts as a small Hopper."""
    if device.type != "cuda":
        return DeviceProperties((9, 0), 2)
    found = torch.cuda.get_device_properties(device)
    return DeviceProperties((found.major, found.minor), found.multi_processor_count)


def prepare(codebook: Tensor) -> list[Tensor]:
    """Return the tensors that `search` needs of a codebook [K, D]; see TritonCodebook."""
    with device_of(codebook):
        return list(launch_prepare(codebook, device_properties(codebook.device).multiprocessors))


def search(x: Tensor, codebook: Tensor, prepared: list[Tensor]) -> Found:
    """Find the nearest code of each row.

    Args:
        x: [N, D], float32, float16 or bfloat16, any strides.
        codebook: [K, D], K >= 1, on x's device; its dtype may differ from x's.
        prepared: what `prepare(codebook)` returned, or empty to prepare here.

    Returns:
        As described at `Found`.
    """
    aligned = x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    plan = _plan(*x.shape, codebook.shape[0], x.dtype, device_properties(x.device), aligned)
    return search_with_plan(x, codebook, prepared, plan)


@functools.lru_cache(1024)
def _plan(n: int, d: int, k: int, dtype: torch.dtype, properties: DeviceProperties, aligned: bool) -> SearchPlan:
    """Cached, because a search of a few rows takes little longer than the Python in front of it."""
    return plan_search(n, k, pick_config(n, k, d, dtype, properties, aligned=aligned), properties)


def search_with_plan(x: Tensor, codebook: Tensor, prepared: list[Tensor], plan: SearchPlan) -> Found:
    """`search` with the given plan."""
    num_rows, multiprocessors = x.shape[0], device_properties(x.device).multiprocessors
    outputs = Outputs(
        indices=x.new_empty(num_rows, dtype=torch.int64),
        codes=x.new_empty(x.shape),
        sq_distances=x.new_empty(num_rows, dtype=torch.float64),
    )
    statistics = x.new_empty(3, dtype=torch.int64) if num_rows else x.new_zeros(3, dtype=torch.int64)
    with device_of(x):
        operands = TritonCodebook(*prepared) if prepared else launch_prepare(codebook, multiprocessors)
        states = launch_scan(x, codebook, operands, plan, outputs, statistics)
        launch_finish(x, codebook, states, outputs, statistics, multiprocessors)
    return *outputs, statistics
