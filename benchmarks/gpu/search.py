"""Stage "search": the search beside what people use today, on the GPU, at the shapes that matter.

The file search.jsonl gets a line a piece, told apart by "op":

    rate            what the GPU reaches on a copy and on bare products (timing.py)
    nearest_code    a contender of `argmin_bench.py` at a shape: verified, timed with the L2 cache flushed, weighed
    memory          what a search takes beyond inputs and outputs, and what it may take
    replay          a call as a CUDA graph's replay, in microseconds, where launches outweigh the work of a plain call
    vector_quantize forward and backward, beside the same in plain PyTorch
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from argmin_bench import Entry, measure_peak, measure_times, verify
from baselines import CONTENDERS, Contender, Search
from search_data import SearchData
from search_timing import is_out_of_memory, peak_mib
from search_verification import checked_rows
from torch import Tensor
from torch.utils import deterministic as deterministic_settings

from gpu.exactness_data import Kind, Part, drawn_blocks
from gpu.plain_model import plain_quantize
from gpu.precompile import Case, precompile
from gpu.results import Results
from gpu.stage import FINISHED, Context, Pace
from gpu.timing import extra_mib, measure_rates, quantiles_ms, replay_us
from vq_kernels import nearest_code, vector_quantize
from vq_kernels.search.triton.plan import workspace_limit

Shape = tuple[int, int, int]
"""N, K, D."""

BARS: tuple[Shape, ...] = tuple((1_048_576, 4_096, code_dim) for code_dim in (64, 128, 256, 512))
SMALL: tuple[Shape, ...] = ((256, 512, 512), (256, 1_024, 512), (1_024, 1_024, 512))
OTHERS: tuple[Shape, ...] = (
    *((65_536, 1_024, 64), (65_536, 8_192, 256), (65_536, 16_384, 256)),
    *((1_048_576, 1_024, 8), (1_048_576, 4_096, 32), (1_048_576, 65_536, 32), (65_536, 512, 8)),
)
DATA: tuple[tuple[str, Kind, float], ...] = (("clustered", "clustered", 0.0), ("offset-1000", "offset", 1000.0))
"""Data sets beyond Gaussian, at one shape; their offset."""
REPLAYED: tuple[Shape, ...] = (*SMALL, (65_536, 1_024, 64), (1_048_576, 1_024, 8))
"""Where Python's launches take longer than the kernels, or nearly so."""
DTYPES = (torch.float16, torch.bfloat16)
"""Beyond float32, at one shape."""
REHEARSED: tuple[Shape, ...] = ((24, 40, 16),)

_MAIN = ("cdist", "addmm", "addmm-chunked", "flash-kmeans", "triton", "triton-prepared")
_CEILINGS = ("gemm", "gemm-tf32", "gemm-16bit")
_IN_GRAPHS = ("triton", "triton-prepared", "flash-kmeans", "addmm", "gemm", "gemm-16bit")
_COMPILED = (*BARS, OTHERS[0])  # where addmm-compiled runs: a compilation each
_CHECK_BUDGET = 1e10  # float64 subtractions of brute force at each shape
_MIB = 1 << 20


def run(context: Context) -> str:
    """Do what pieces the results do not hold yet."""
    results = context.results("search")
    bars, small, others = (BARS, SMALL, OTHERS) if not context.rehearse else (REHEARSED, REHEARSED, ())
    replayed = REHEARSED if context.rehearse else REPLAYED
    data_sets, dtypes = (DATA, DTYPES) if not context.rehearse else (DATA[:1], DTYPES[:1])
    precompile([Case(shape) for shape in (*bars, *small, *others)], context)
    pieces = [partial(measure_rates, results, context)]
    pieces += [partial(replay, results, context, shape) for shape in replayed]
    pieces += [partial(bench, results, context, shape) for shape in (*bars, *small, *others)]
    pieces += [partial(quantize, results, context, shape) for shape in (*bars, *others[:2], *small[:1])]
    pieces += [partial(bench, results, context, bars[0], *data) for data in data_sets]
    pieces += [partial(bench, results, context, bars[0], dtype=dtype) for dtype in dtypes]
    pace = Pace(context)
    left = [piece for piece in pieces if not pace.do(piece, piece.func)]
    if left:
        return f"{len(left)} of {len(pieces)} pieces left: no time left"
    wrong = [line for line in results.lines if line.get("status") == "WRONG" or line.get("within") is False]
    return f"failed: {len(wrong)} lines are wrong or beyond the memory limit" if wrong else FINISHED


def contenders(shape: Shape, context: Context) -> Iterable[Contender]:
    """Who runs at a shape; a rehearsal lets all run that can."""
    compiled = ("addmm-compiled",) if shape in _COMPILED else ()
    chosen = [CONTENDERS[name] for name in (*_MAIN, *compiled, *_CEILINGS)]
    chosen.append(Contender("flash-kmeans-norms", "TF32", _build_with_norms, ("cuda",), "flash_kmeans"))
    return [replace(contender, devices=("cpu",)) for contender in chosen] if context.rehearse else chosen


def _build_with_norms(x: Tensor, codebook: Tensor) -> Search:
    """flash-kmeans with what it may know beforehand: the rows' norms, as between two rounds of K-means."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    norms = x.float().square().sum(dim=1)[None]

    def search() -> Tensor:
        indices: Tensor = euclid_assign_triton(x[None], codebook[None], norms)
        return indices[0]

    return search


def draw(
    shape: Shape,
    context: Context,
    kind: Kind = "gaussian",
    offset: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> SearchData:
    """x [N, D] and a codebook [K, D] on the device."""
    part = Part("", kind, shape[1], shape[2], dtype, shape[0], offset=offset)
    return SearchData(*next(drawn_blocks(part, shape[0], seed=0, device=context.device)))


def bench(
    results: Results,
    context: Context,
    shape: Shape,
    data: str = "gaussian",
    kind: Kind = "gaussian",
    offset: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """The lines of all contenders at one shape, then that of the memory."""
    name = {"N": shape[0], "K": shape[1], "D": shape[2], "dtype": str(dtype).removeprefix("torch."), "data": data}
    if results.has(op="memory", **name):
        return
    drawn = draw(shape, context, kind, offset, dtype)
    entries = [Entry(contender) for contender in contenders(shape, context)]
    verify(entries, drawn, checked_rows(*shape, budget=_CHECK_BUDGET).to(context.device))
    measure_times(entries, shape, context.device, rounds=1 if context.rehearse else 10, quick=True)
    for entry in entries:
        if entry.search is not None:
            entry.measured["peak_mib"] = measure_peak(entry, drawn, context.device)
        contender = entry.contender
        precision = contender.precision_for(dtype)
        results.add(
            op="nearest_code", contender=contender.name, precision=precision, **name, status=entry.status,
            **entry.measured,
        )  # fmt: skip
    results.add(op="memory", **name, **extra_memory(drawn, shape, context.device))


def extra_memory(data: SearchData, shape: Shape, device: torch.device) -> dict[str, float | bool | None]:
    """What a search takes beyond inputs and outputs, and whether that is within the limit of `workspace_limit`."""
    limit_mib = workspace_limit(*shape) / _MIB
    nearest_code(*data, backend="triton")  # compiles
    if device.type != "cuda":  # a process's pages are no measure of what the kernels allocate
        return {"extra_mib": None, "requested_mib": None, "limit_mib": limit_mib, "within": None}
    extra, requested = extra_mib(lambda: nearest_code(*data, backend="triton"))
    return {"extra_mib": extra, "requested_mib": requested, "limit_mib": limit_mib, "within": extra <= limit_mib}


def replay(results: Results, context: Context, shape: Shape) -> None:
    """The lines of calls as replays of CUDA graphs, at one shape."""
    size = {"N": shape[0], "K": shape[1], "D": shape[2]}
    data = draw(shape, context)
    for contender in (one for one in contenders(shape, context) if one.name in _IN_GRAPHS):
        if results.has(op="replay", contender=contender.name, **size):
            continue
        status, times = contender.obstacle(context.device.type, torch.float32) or "ok", {}
        if status == "ok":
            try:
                times = replay_us(contender.build(*data), context.device)
            except Exception as error:  # a contender that cannot be captured is a result
                status = f"failed: {type(error).__name__}: {str(error)[:200]}"
        results.add(op="replay", contender=contender.name, **size, status=status, **times)


def fills_memory(value: bool) -> None:
    """Whether deterministic algorithms fill new memory with NaN, as they do unless told otherwise."""
    deterministic_settings.fill_uninitialized_memory = value  # type: ignore[attr-defined]


def quantize(results: Results, context: Context, shape: Shape) -> None:
    """The lines of forward and backward at one shape: this library's, with the deterministic sum too, and plain."""
    size = {"N": shape[0], "K": shape[1], "D": shape[2]}
    x, codebook = (tensor.requires_grad_() for tensor in draw(shape, context, "clustered"))
    arriving, one = torch.ones_like(x), torch.ones((), device=x.device)

    def step(forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, ...]:
        quantized, _, loss = forward(x, codebook)
        return torch.autograd.grad([quantized, loss], [x, codebook], [arriving, one])

    for name, deterministic, call in (
        ("vector_quantize", False, partial(step, vector_quantize)),
        ("vector_quantize, deterministic", True, partial(step, vector_quantize)),
        ("cdist + argmin", False, partial(step, plain_quantize)),
    ):
        if results.has(op="vector_quantize", contender=name, **size):
            continue
        torch.use_deterministic_algorithms(deterministic)
        fills_memory(False)  # which is for debugging: all that is read has been written
        try:
            low, middle, high = quantiles_ms(call, context.device, count=2 if context.rehearse else 15)
            times = {"p20_ms": low, "p50_ms": middle, "p80_ms": high, "peak_mib": peak_mib(call, context.device)}
            status = "ok"
        except Exception as error:  # what does not run is a result
            status, times = "out of memory" if is_out_of_memory(error) else f"failed: {str(error)[:200]}", {}
        finally:
            torch.use_deterministic_algorithms(False)
            fills_memory(True)
        results.add(op="vector_quantize", contender=name, **size, status=status, **times)
