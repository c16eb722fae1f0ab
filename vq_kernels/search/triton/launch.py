"""The Triton backend: prepare, scan, merge, rerank. No step waits for the device."""

import functools

import torch
from torch import Tensor

from vq_kernels.search.backend import Found
from vq_kernels.search.triton.common import Outputs, Uncertified
from vq_kernels.search.triton.plan import DeviceProperties, SearchPlan, pick_config, plan_search
from vq_kernels.search.triton.prepare import TritonCodebook, launch_prepare
from vq_kernels.search.triton.rerank import launch_merge, launch_rerank
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
    properties = device_properties(x.device)
    (n, d), k = x.shape, codebook.shape[0]
    aligned = x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    config = pick_config(n, k, d, x.dtype, properties, aligned=aligned)
    return search_with_plan(x, codebook, prepared, plan_search(n, k, d, config, properties))


def search_with_plan(x: Tensor, codebook: Tensor, prepared: list[Tensor], plan: SearchPlan) -> Found:
    """`search` with the given plan."""
    num_rows = x.shape[0]
    operands = TritonCodebook(*(prepared or prepare(codebook)))
    outputs = Outputs(
        indices=torch.empty(num_rows, dtype=torch.int64, device=x.device),
        codes=torch.empty(x.shape, dtype=x.dtype, device=x.device),
        sq_distances=torch.empty(num_rows, dtype=torch.float64, device=x.device),
    )
    statistics = torch.zeros(3, dtype=torch.int64, device=x.device)
    for start in range(0, num_rows, plan.rows_per_launch):
        part = slice(start, min(start + plan.rows_per_launch, num_rows))
        rows, written = x[part], Outputs(*(output[part] for output in outputs))
        uncertified = _no_rows_yet(rows)
        states = launch_scan(rows, codebook, operands, plan, written, uncertified)
        if states is not None:
            launch_merge(rows, codebook, plan, states, written, uncertified)
        launch_rerank(rows, codebook, written, uncertified, statistics, device_properties(x.device).multiprocessors)
        del uncertified, states  # freed here, so that the next round reuses their memory
    return *outputs, statistics


def _no_rows_yet(x: Tensor) -> Uncertified:
    """`Uncertified` with room for every row of x."""
    return Uncertified(
        counters=x.new_zeros(2, dtype=torch.int32),
        rerank_rows=x.new_empty(x.shape[0], dtype=torch.int32),
        candidates=x.new_empty((x.shape[0], 4), dtype=torch.int32),
        exhaustive_rows=x.new_empty(x.shape[0], dtype=torch.int32),
    )
