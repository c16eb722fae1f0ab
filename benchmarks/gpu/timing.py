"""Times of one call on the GPU, and what the GPU reaches on the simplest work there is.

The floors of docs/explanations/performance.md stand on these rates.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from baselines import matmul_precision
from search_timing import CudaEvents, Timer, WallClock, captured
from torch import Tensor

from gpu.results import Results
from gpu.stage import Context

_IN_A_GRAPH = 20  # calls that share one replay's launch
_REPLAYS = 50

_SIDE = 8192  # of the matrices
_REHEARSED_SIDE = 64
_COPY_BYTES = 4 << 30
_L2_BYTES = 12 << 20  # twice that fits an H200's L2 cache well
_WITHIN_L2 = "copy within L2"
_GEMMS = {
    "gemm float16": (torch.float16, "highest"),
    "gemm bfloat16": (torch.bfloat16, "highest"),
    "gemm TF32": (torch.float32, "high"),
    "gemm float32": (torch.float32, "highest"),
    "gemm float64": (torch.float64, "highest"),
}


def median_ms(call: Callable[[], object], device: torch.device, *, count: int = 20) -> float:
    """The median time of a call, after two to warm up; on a GPU the L2 cache is flushed before each."""
    return quantiles_ms(call, device, count=count)[1]


def quantiles_ms(call: Callable[[], object], device: torch.device, *, count: int = 20) -> tuple[float, float, float]:
    """The 20, 50 and 80 % quantiles of the time of a call, in milliseconds, after two to warm up."""
    timer: Timer = CudaEvents() if device.type == "cuda" else WallClock()
    call()
    call()
    low, middle, high = (float(value) for value in np.quantile(timer.burst(call, count), (0.2, 0.5, 0.8)))
    return low, middle, high


def extra_mib(call: Callable[[], object]) -> tuple[float, float]:
    """The most that a call holds of a GPU's memory at a time beyond what it returns, in MiB; it has run before.

    Returns:
        As PyTorch's allocator counts, and as it was asked: to a buffer above 1 MiB it adds up to 1 MiB of its block.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    returned = call()
    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()
    del returned  # held until here: what is allocated now is what was before, and this
    counted, asked = (
        (stats[f"{name}_bytes.all.peak"] - stats[f"{name}_bytes.all.current"]) / (1 << 20)
        for name in ("allocated", "requested")
    )
    return counted, asked


def replay_us(call: Callable[[], Tensor], device: torch.device) -> dict[str, float]:
    """What a call takes as part of a CUDA graph, in microseconds.

    Returns:
        warm_us: a share of a replay that holds the call 20 times, its data in the L2 cache, the launch of the replay
            shared by all. cold_us: the replay of a graph that holds it once, the L2 cache flushed, its launch counted.
            On a CPU both are the time of a plain call.

    Raises:
        RuntimeError: the call cannot be captured: it waits for the GPU, for one.
    """
    if device.type != "cuda":
        plain_us = 1e3 * median_ms(call, device, count=3)
        return {"warm_us": plain_us, "cold_us": plain_us}

    def many() -> Tensor:
        for _ in range(_IN_A_GRAPH - 1):
            call()
        return call()

    cold = np.median(CudaEvents().burst(captured(call), _REPLAYS))
    replay = captured(many)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    warm = []
    for _ in range(_REPLAYS):
        start.record()
        replay()
        end.record()
        end.synchronize()
        warm.append(start.elapsed_time(end) / _IN_A_GRAPH)
    return {"warm_us": 1e3 * float(np.median(warm)), "cold_us": 1e3 * float(cold)}


def measure_rates(results: Results, context: Context) -> None:
    """A line for each rate: copying, in 10^12 bytes a second read and written, and products, in 10^12 operations."""
    for name, amount, unit, call in _simple_calls(context):
        if results.has(op="rate", name=name):
            continue
        if name == _WITHIN_L2:
            elapsed_ms = 1e-3 * replay_us(call, context.device)["warm_us"]
        else:
            elapsed_ms = median_ms(call, context.device, count=3 if context.rehearse else 20)
        results.add(op="rate", name=name, value=1e-9 * amount / elapsed_ms, unit=unit, ms=elapsed_ms)


def _simple_calls(context: Context) -> Iterator[tuple[str, float, str, Callable[[], Tensor]]]:
    """(name, bytes or operations, unit, call), one after the other, so that one's memory is free for the next."""
    for name, size in (("copy", _COPY_BYTES), (_WITHIN_L2, _L2_BYTES)):
        target, source = torch.ones(2, (1 << 14 if context.rehearse else size) // 4, device=context.device)
        yield name, 2.0 * source.nbytes, "TB/s", lambda to=target, of=source: to.copy_(of)  # type: ignore[misc]
    side = _REHEARSED_SIDE if context.rehearse else _SIDE
    for name, (dtype, precision) in _GEMMS.items():
        yield name, 2.0 * side**3, "TFLOP/s", _product(side, dtype, precision, context.device)


def _product(side: int, dtype: torch.dtype, precision: str, device: torch.device) -> Callable[[], Tensor]:
    """A product of two square matrices, in a precision of float32's products."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)

    def multiply() -> Tensor:
        with matmul_precision(precision):
            return torch.mm(left, right, out=product)

    return multiply
