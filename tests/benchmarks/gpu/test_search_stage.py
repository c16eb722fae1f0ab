"""The search stage: who runs where, that pieces are gone on with, and what fails the stage."""

import dataclasses
import time
from pathlib import Path

import pytest
import torch
from gpu import search
from gpu.results import make_header
from gpu.search import BARS, OTHERS, REHEARSED, REPLAYED, SMALL, contenders, extra_memory
from gpu.stage import FINISHED, Context
from gpu.timing import quantiles_ms, replay_us
from search_data import SearchData

from vq_kernels.search.triton.plan import workspace_limit

CPU = torch.device("cpu")


@pytest.fixture
def context(tmp_path: Path) -> Context:
    header = make_header((), "abc", rehearse=True)
    return Context(out=tmp_path, work=tmp_path, header=header, deadline=time.monotonic() + 600, rehearse=True)


def names(shape: tuple[int, int, int], context: Context) -> list[str]:
    return [contender.name for contender in contenders(shape, context)]


def test_everyone_who_is_asked_for_runs_at_the_bars(context: Context) -> None:
    asked = {"cdist", "addmm", "addmm-compiled", "flash-kmeans", "triton", "gemm", "gemm-tf32", "gemm-16bit"}
    for shape in BARS:
        assert asked <= set(names(shape, context))
    assert "addmm-compiled" not in names(SMALL[0], context)


def test_no_shape_is_measured_twice() -> None:
    shapes = [*BARS, *SMALL, *OTHERS]
    assert len(set(shapes)) == len(shapes)


@pytest.mark.parametrize(("extra_mib", "within"), [(15.9, True), (16.1, False)])
def test_memory_is_held_against_the_limit(monkeypatch: pytest.MonkeyPatch, extra_mib: float, within: bool) -> None:
    data = SearchData(torch.zeros(24, 16), torch.zeros(40, 16))
    monkeypatch.setattr(search, "nearest_code", lambda x, codebook, backend: None)
    monkeypatch.setattr(search, "extra_mib", lambda call: (extra_mib, 15.5))
    found = extra_memory(data, REHEARSED[0], torch.device("cuda"))
    assert (found["extra_mib"], found["requested_mib"]) == (extra_mib, 15.5)
    assert found["limit_mib"] == workspace_limit(*REHEARSED[0]) / 2**20 == pytest.approx(16, abs=0.01)
    assert found["within"] is within
    assert extra_memory(data, REHEARSED[0], CPU)["within"] is None


@pytest.fixture
def without_searches(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("precompile", "measure_rates", "replay", "quantize", "bench"):
        monkeypatch.setattr(search, name, lambda *arguments, **options: None)
    return monkeypatch


def test_a_wrong_line_or_too_much_memory_fails_the_stage(
    context: Context, without_searches: pytest.MonkeyPatch
) -> None:
    assert search.run(context) == FINISHED
    context.results("search").add(op="nearest_code", status="WRONG")
    context.results("search").add(op="memory", within=False)
    assert search.run(context) == "failed: 2 lines are wrong or beyond the memory limit"


def test_the_stage_stops_in_time(tmp_path: Path, without_searches: pytest.MonkeyPatch) -> None:
    header = make_header((), "abc", rehearse=True)
    late = Context(out=tmp_path, work=tmp_path, header=header, deadline=time.monotonic() + 10, rehearse=True)
    assert search.run(late).endswith("pieces left: no time left")


def test_forward_and_backward_are_timed_at_every_bar(context: Context, without_searches: pytest.MonkeyPatch) -> None:
    seen = {"quantize": [], "replay": []}
    for name, shapes in seen.items():
        without_searches.setattr(search, name, lambda results, context, shape, to=shapes: to.append(shape))
    without_searches.setattr(Context, "synchronize", lambda context: None)
    search.run(dataclasses.replace(context, rehearse=False))
    assert set(BARS) <= set(seen["quantize"])
    assert seen["replay"] == list(REPLAYED)


def test_the_deterministic_step_fills_no_memory(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = []

    def note(call: object, device: torch.device, count: int) -> tuple[float, float, float]:
        filled.append(torch.utils.deterministic.fill_uninitialized_memory)
        return 1.0, 1.0, 1.0

    monkeypatch.setattr(search, "quantiles_ms", note)
    monkeypatch.setattr(search, "peak_mib", lambda call, device: None)
    search.quantize(context.results("search"), context, REHEARSED[0])
    assert filled == [False] * 3
    assert torch.utils.deterministic.fill_uninitialized_memory is True


def test_a_search_that_cannot_be_captured_is_a_line(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(call: object, device: torch.device) -> dict[str, float]:
        raise RuntimeError("it waits for the GPU")

    monkeypatch.setattr(search, "replay_us", refuse)
    monkeypatch.setattr(search, "_IN_GRAPHS", ("addmm", "flash-kmeans"))
    results = context.results("search")
    search.replay(results, context, REHEARSED[0])
    assert [line["status"] for line in results.lines] == ["failed: RuntimeError: it waits for the GPU",
                                                          "not installed"]  # fmt: skip
    search.replay(results, context, REHEARSED[0])
    assert len(results.lines) == 2


def test_times_on_a_cpu_are_those_of_plain_calls() -> None:
    calls = []

    def call() -> torch.Tensor:
        calls.append(time.sleep(0.002))
        return torch.zeros(())

    low, middle, high = quantiles_ms(call, CPU, count=3)
    assert 2.0 <= low <= middle <= high
    assert len(calls) == 5
    found = replay_us(call, CPU)
    assert found["warm_us"] == found["cold_us"] >= 2000
