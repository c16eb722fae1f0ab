"""Timing and memory of calls on a CPU or a GPU."""

import ctypes
import gc
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from baselines import Search

GRAPH_ROWS = 4096
"""Up to so many rows a CUDA call is replayed from a graph: its launch would outweigh its work."""

_L2_FLUSH_BYTES = 256 << 20
_MIB = 1 << 20


class Timer(Protocol):
    """Times calls of one kind."""

    method: str

    def burst(self, call: Callable[[], object], count: int) -> list[float]:
        """Milliseconds of each of `count` calls."""


class WallClock:
    """For the CPU: the wall time of each call."""

    method = "wall clock"

    def burst(self, call: Callable[[], object], count: int) -> list[float]:
        """Milliseconds of each of `count` calls."""
        elapsed_ms = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            elapsed_ms.append(1e3 * (time.perf_counter() - start))
        return elapsed_ms


class CudaEvents:
    """For a GPU: events around each call, the L2 cache flushed before it, as `triton.testing.do_bench` does."""

    method = "CUDA events, L2 flushed"

    def __init__(self) -> None:
        self._flush = torch.empty(_L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def burst(self, call: Callable[[], object], count: int) -> list[float]:
        """Milliseconds of each of `count` calls."""
        starts = [torch.cuda.Event(enable_timing=True) for _ in range(count)]  # type: ignore[no-untyped-call]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(count)]  # type: ignore[no-untyped-call]
        for start, end in zip(starts, ends, strict=True):
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


def captured(call: Search) -> Callable[[], object]:
    """`call` as the replay of a CUDA graph.

    Raises:
        RuntimeError: the call cannot be captured: it waits for the GPU, for one.
    """
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


def time_in_turn(
    calls: Mapping[str, Callable[[], object]], timer: Timer, *, rounds: int, burst_ms: float
) -> dict[str, list[float]]:
    """Times calls in turn, round after round, so that a slow minute of the machine falls on all of them.

    Args:
        calls: what to time, by name; each has run once before.
        timer: how.
        rounds: how often each gets its turn.
        burst_ms: a turn takes about so long, in at most 50 calls, at least one.

    Returns:
        The milliseconds of every call, by name.
    """
    elapsed_ms: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            known = elapsed_ms[name]
            count = 1 if not known else max(1, min(50, math.ceil(burst_ms / max(min(known), 1e-3))))
            known += timer.burst(call, count)
    return elapsed_ms


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """The most memory held during a call beyond what was held before it, outputs included, in MiB.

    On CUDA by the allocator's count. On Linux CPUs by the growth of the peak resident set (VmHWM, reset before the
    call; freed heap pages are given back first). None elsewhere. The call has run before: what libraries keep for good
    is not in it.
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
    ctypes.CDLL(None).malloc_trim(0)
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
    """Let allocations beyond the memory that is free now fail, instead of the process being killed. Linux alone."""
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the GPU or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
