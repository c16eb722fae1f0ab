"""The Triton backend: prepare, scan, merge, resolve, drain. No step waits for the device."""

import functools
import os

import torch
from torch import Tensor

from vq_kernels.search.triton.certify import Outputs, make_lists
from vq_kernels.search.triton.plan import DeviceProperties, SearchPlan, pick_config, plan_search
from vq_kernels.search.triton.prepare import TritonCodebook, launch_prepare
from vq_kernels.search.triton.rerank import launch_merge, launch_resolve
from vq_kernels.search.triton.scan import launch_scan


def is_available(device: torch.device | str) -> tuple[bool, str]:
    """Whether the kernels run on a device, and why or why not."""
    device = torch.device(device)
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return interpreted, f"TRITON_INTERPRET=1 is {'' if interpreted else 'not '}set, and the device is the CPU"
    if device.type != "cuda" or torch.version.hip:
        return False, f"the kernels are for CUDA, and the device is {'ROCm' if torch.version.hip else device.type}"
    if not torch.cuda.is_available():
        return False, "torch.cuda.is_available() is False"
    major, minor = torch.cuda.get_device_capability(device)
    return major >= 8, f"the kernels need sm_80 or newer, and the GPU is sm_{major}{minor}"


@functools.cache
def device_properties(device: torch.device) -> DeviceProperties:
    """What the choice of tiles needs of a device; a small Hopper in place of the CPU, for the interpreter."""
    if device.type != "cuda":
        return DeviceProperties((9, 0), 2)
    found = torch.cuda.get_device_properties(device)
    return DeviceProperties((found.major, found.minor), found.multi_processor_count)


def prepare(codebook: Tensor) -> list[Tensor]:
    """The tensors that `search` reads of a codebook [K, D]; see TritonCodebook."""
    return list(launch_prepare(codebook))


def search(
    x: Tensor, codebook: Tensor, prepared: list[Tensor], precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The nearest code of each row.

    Args:
        x: [N, D], float32, float16 or bfloat16, any strides.
        codebook: [K, D], K >= 1, on x's device; its dtype may differ from x's.
        prepared: what `prepare(codebook)` returned; empty to prepare here.
        precision: "exact", or "fast", which takes the best 16-bit score without proof.

    Returns:
        indices [N] int64, codes [N, D] in x's dtype, sq_distances [N] float32, statistics [3] int64: rows proved at
        once, resolved among candidates, drained. "fast" counts every row as proved.
    """
    properties = device_properties(x.device)
    num_codes, code_dim = codebook.shape
    aligned = x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    config = pick_config(x.shape[0], num_codes, code_dim, x.dtype, properties, aligned=aligned)
    return search_with_plan(
        x, codebook, prepared, precision, plan_search(x.shape[0], num_codes, code_dim, config, properties)
    )


def search_with_plan(
    x: Tensor, codebook: Tensor, prepared: list[Tensor], precision: str, plan: SearchPlan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`search` with tiles, splits and rows a launch as given."""
    num_rows = x.shape[0]
    multiprocessors = device_properties(x.device).multiprocessors
    operands = TritonCodebook(*prepared) if prepared else launch_prepare(codebook)
    outputs = Outputs(
        indices=torch.empty(num_rows, dtype=torch.int64, device=x.device),
        codes=torch.empty(x.shape, dtype=x.dtype, device=x.device),
        sq_distances=torch.empty(num_rows, dtype=torch.float32, device=x.device),
    )
    statistics = torch.zeros(3, dtype=torch.int64, device=x.device)
    exact = precision == "exact"
    if not exact:
        statistics[0].fill_(num_rows)
    for start in range(0, num_rows, plan.rows_per_launch):
        part = slice(start, min(start + plan.rows_per_launch, num_rows))
        rows, written = x[part], Outputs(*(output[part] for output in outputs))
        lists = make_lists(rows.shape[0], x.device) if exact else None
        states = launch_scan(rows, codebook, operands, plan, written, lists)
        if states is not None:
            launch_merge(rows, codebook, plan, states, written, lists)
        if lists is not None:
            launch_resolve(rows, codebook, written, lists, statistics, multiprocessors)
        lists = states = None  # free for the next round, which would else allocate its own beside them
    return *outputs, statistics
