"""Time and memory of calls on a CPU or a GPU."""

import ctypes
import gc
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

TIMING = {"cpu": "wall clock", "cuda": "CUDA events, L2 flushed"}  # how `burst` measures, by the type of the device
_L2_FLUSH_BYTES = 256 << 20
_MIB = 1 << 20


def burst(call: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `count` calls. On a GPU the L2 cache is flushed before each, as by triton's do_bench."""
    if device.type != "cuda":
        elapsed_ms = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            elapsed_ms.append(1e3 * (time.perf_counter() - start))
        return elapsed_ms
    flush = torch.empty(_L2_FLUSH_BYTES, dtype=torch.int8, device=device)
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(count)]  # type: ignore[no-untyped-call]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(count)]  # type: ignore[no-untyped-call]
    for before, after in zip(starts, ends, strict=True):
        flush.zero_()
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in zip(starts, ends, strict=True)]


def time_in_turn(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int, burst_ms: float
) -> dict[str, list[float]]:
    """Times calls in turn, round after round, so that a temporary slowdown of the machine affects all of them.

    Each call has run once before. A turn takes about burst_ms and has 1 to 50 calls. Returns the milliseconds of every
    call, by name.
    """
    elapsed_ms: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            known = elapsed_ms[name]
            count = 1 if not known else max(1, min(50, math.ceil(burst_ms / max(min(known), 1e-3))))
            known += burst(call, count, device)
    return elapsed_ms


def quantiles(elapsed_ms: Sequence[float]) -> dict[str, float]:
    """p20_ms, p50_ms and p80_ms of at least one measured time."""
    names = ("p20_ms", "p50_ms", "p80_ms")
    return dict(zip(names, map(float, np.quantile(elapsed_ms, (0.2, 0.5, 0.8))), strict=True))


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Captures a call as a CUDA graph and returns its replay. Raises RuntimeError if the call waits for the GPU."""
    side_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """The most memory in MiB that a call holds beyond what was held before it, outputs included. It has run before.

    On CUDA the allocator counts. On a Linux CPU it is the growth of the peak resident set (VmHWM). None elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated(device) - before) / _MIB
    if not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # gives freed heap pages back
    Path("/proc/self/clear_refs").write_text("5")
    before_kib = _proc_kib("self/status", "VmRSS")
    call()
    return max(0.0, (_proc_kib("self/status", "VmHWM") - before_kib) / 1024)


def _proc_kib(file: str, field: str) -> int:
    """A field of a file under /proc, in KiB."""
    for line in Path("/proc", file).read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    raise LookupError(f"/proc/{file} has no {field}")


@contextmanager
def host_memory_limit() -> Iterator[None]:
    """Limits the process to the memory that is free now, so that larger allocations fail. Linux only."""
    if not Path("/proc/meminfo").exists():
        yield
        return
    limit_kib = _proc_kib("self/status", "VmSize") + _proc_kib("meminfo", "MemAvailable")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1024 * limit_kib, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def failure(error: BaseException) -> str:
    """The status of a row whose call raised: "out of memory" or "failed: " and the first line of the message."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    return f"failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
