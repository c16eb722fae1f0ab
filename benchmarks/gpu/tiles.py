"""Stage "tiles": is `pick_config`'s choice the fastest, and where does a search's time go?

The file tiles.jsonl gets a line a piece, told apart by "op":

    tile        one choice of tiles at one shape, timed on a prepared codebook, its indices held against the usual's
    choice      of a shape: `pick_config`'s choice, the fastest found, the ratio of their times
    profile     the kernels of a search, each with its time (profiles.py)
    counters    Nsight Compute's figures of the scan (profiles.py)

The choices tried are `pick_config`'s, its neighbours by one property, and the other configurations that can serve; then
the neighbours of the fastest.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from search_data import SearchData
from search_timing import GRAPH_ROWS
from torch import Tensor

from gpu.precompile import Case, precompile
from gpu.profiles import profile_counters, profile_kernels
from gpu.results import Results
from gpu.search import BARS, REHEARSED, SMALL, Shape, draw
from gpu.stage import FINISHED, Context, Pace
from gpu.timing import median_ms, replay_us
from vq_kernels.search.triton.common import ceil_div
from vq_kernels.search.triton.launch import device_properties, prepare, search_with_plan
from vq_kernels.search.triton.plan import CONFIGS, MAX_TILES_PER_SPLIT, ScanConfig, SearchPlan, pick_config, plan_search

SHAPES: tuple[Shape, ...] = (
    *BARS, *SMALL, (65_536, 1_024, 64), (65_536, 8_192, 256), (1_048_576, 1_024, 8), (1_048_576, 4_096, 32),
)  # fmt: skip

_TILES = ((64, 64), (64, 128), (128, 64), (128, 128), (256, 64))  # block_n, block_k; codes are padded to 128
_WARPS = (4, 8)
_STAGES = (2, 3, 4)
_REGISTERS = (None, 128, 168, 224)
_PIECES = (32, 64, 128)  # block_d of a loop over D
_SPLITS = (1, 2, 4, 8, 16)  # of a codebook that few rows share
_REHEARSED_CHOICES = 2


@dataclass(frozen=True)
class Choice:
    """A way to make the tiles: a configuration, and into how many parts the codebook goes (None: as `plan_search`)."""

    config: ScanConfig
    splits: int | None = None

    @property
    def label(self) -> str:
        """All of it in a few words; equal labels, equal kernels."""
        config = self.config
        place = "x' in the scan" if config.resident else f"x' before, pieces of {config.block_d}"
        registers = "" if config.max_registers is None else f", {config.max_registers} registers"
        splits = "" if self.splits is None else f", {self.splits} parts"
        tile = f"{config.block_n} x {config.block_k}"
        return f"{tile}, {config.num_warps} warps, {config.num_stages} stages, {place}{registers}{splits}"

    def plan(self, shape: Shape, device: torch.device) -> SearchPlan:
        """How a search of that shape is launched."""
        plan = plan_search(*shape, self.config, device_properties(device))
        if self.splits is None:
            return plan
        tiles = ceil_div(shape[1], self.config.block_k)
        tiles_per_split = min(ceil_div(tiles, self.splits), MAX_TILES_PER_SPLIT)
        return SearchPlan(self.config, ceil_div(tiles, tiles_per_split), tiles_per_split, plan.rows_per_launch)


def run(context: Context) -> str:
    """Do what pieces the results do not hold yet: where the time goes first, at every shape."""
    results = context.results("tiles")
    shapes = REHEARSED if context.rehearse else SHAPES
    pieces = [partial(profile_kernels, results, context, shape) for shape in shapes]
    pieces += [partial(profile_counters, results, context, shape) for shape in shapes[: len(BARS)]]
    pieces += [partial(sweep, results, context, shape) for shape in shapes]
    pace = Pace(context, first_s=30.0)  # a sweep looks at the clock itself, and writes line by line
    left = [piece for piece in pieces if not pace.do(piece, piece.func)]
    unfinished = [shape for shape in shapes if not results.has(op="choice", **_size(shape))]
    if left or unfinished:
        return f"{len(left)} of {len(pieces)} pieces and {len(unfinished)} shapes left: no time left"
    return FINISHED


def sweep(results: Results, context: Context, shape: Shape) -> None:
    """Time the choices at a shape, then the neighbours of the fastest, and write the line that compares."""
    if results.has(op="choice", **_size(shape)):
        return
    usual = Choice(pick_config(*shape, torch.float32, device_properties(context.device)))
    data = draw(shape, context)
    expected = search_with_plan(*data, [], "exact", usual.plan(shape, context.device))[0]
    times = {line["choice"]: line.get("ms", float("inf")) for line in results.matching(op="tile", **_size(shape))}
    for from_fastest in (False, True):
        start = fastest_choice(results, shape) if from_fastest else usual
        tried = [
            start,
            *neighbours(start, shape),
            *(Choice(config) for config in [c for c in CONFIGS if not c.resident or shape[2] <= c.block_d]),
        ]
        new = {choice.label: choice for choice in tried if choice.label not in times}
        if context.rehearse:
            new = dict(list(new.items())[:_REHEARSED_CHOICES])
        precompile([Case(shape, choice.config) for choice in new.values()], context)
        for label, choice in new.items():
            if context.left_s() < 10 and not context.rehearse:
                return  # no comparison: the next run does the rest of the shape
            line = time_choice(choice, shape, data, expected, context)
            results.add(op="tile", **_size(shape), choice=label, config=_plain(choice), **line)
            context.synchronize()  # what a choice broke must not be blamed on the next
            times[label] = line.get("ms", float("inf"))
    best = min(times, key=lambda label: times[label])
    usual_ms = times[usual.label]
    results.add(
        op="choice", **_size(shape), usual=usual.label, usual_name=usual.config.name, usual_ms=usual_ms, best=best,
        best_ms=times[best], ratio=usual_ms / times[best],
    )  # fmt: skip


def fastest_choice(results: Results, shape: Shape) -> Choice:
    """The fastest that was timed at a shape."""
    fastest = min(results.matching(op="tile", status="ok", **_size(shape)), key=lambda line: float(line["ms"]))
    entries = dict(fastest["config"])
    return Choice(splits=entries.pop("splits"), config=ScanConfig(**entries, reason="tried on the GPU"))


def neighbours(choice: Choice, shape: Shape) -> list[Choice]:
    """What differs from a choice in one property."""
    config = choice.config
    changes: list[dict[str, Any]] = [{"block_n": n, "block_k": k} for n, k in _TILES]
    changes += [{"num_warps": warps} for warps in _WARPS]
    changes += [{"num_stages": stages} for stages in _STAGES]
    changes += [{"max_registers": registers} for registers in _REGISTERS]
    if not config.resident:
        changes += [{"block_d": piece} for piece in _PIECES]
    found = [Choice(dataclasses.replace(config, **change), choice.splits) for change in changes]
    if shape[0] <= GRAPH_ROWS:
        found += [Choice(config, splits) for splits in _SPLITS]
    return found


def time_choice(choice: Choice, shape: Shape, data: SearchData, expected: Tensor, context: Context) -> dict[str, Any]:
    """The entries of a choice's line: whether it runs, whether it finds the same indices, and its time."""
    prepared = prepare(data.codebook)
    plan = choice.plan(shape, context.device)

    def search() -> Tensor:
        return search_with_plan(*data, prepared, "exact", plan)[0]

    try:
        if not torch.equal(search(), expected):
            return {"status": "WRONG", "splits": plan.splits}
        if shape[0] <= GRAPH_ROWS:
            elapsed_ms = 1e-3 * replay_us(search, context.device)["warm_us"]
        else:
            elapsed_ms = median_ms(search, context.device, count=12)
    except Exception as error:  # too much shared memory, too few registers: no candidate
        return {"status": f"failed: {type(error).__name__}: {str(error)[:160]}", "splits": plan.splits}
    return {"status": "ok", "splits": plan.splits, "ms": elapsed_ms}


def _plain(choice: Choice) -> dict[str, Any]:
    """A choice as entries of JSON."""
    entries = dataclasses.asdict(choice.config)
    del entries["reason"]
    return {**entries, "splits": choice.splits}


def _size(shape: Shape) -> dict[str, int]:
    return {"N": shape[0], "K": shape[1], "D": shape[2]}
