"""Which tiles are tried, how they compare, and that a wrong or broken choice is never the fastest."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import tiles
from gpu.results import make_header
from gpu.search import BARS, SMALL, draw
from gpu.stage import Context
from gpu.tiles import SHAPES, Choice, fastest_choice, neighbours, sweep
from torch import Tensor

from vq_kernels.search.reference import brute_force_nearest
from vq_kernels.search.triton.plan import CONFIGS, MAX_TILES_PER_SPLIT, SearchPlan

SHAPE = (24, 40, 16)
RESIDENT, LOOPED = CONFIGS[0], next(config for config in CONFIGS if not config.resident)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    header = make_header((), "abc", rehearse=True)
    return Context(out=tmp_path, work=tmp_path, header=header, deadline=time.monotonic() + 600, rehearse=True)


def test_equal_labels_mean_equal_kernels() -> None:
    tried = [choice for shape in SHAPES for config in CONFIGS for choice in neighbours(Choice(config), shape)]
    kernels = {}
    for choice in tried:
        config = choice.config
        kernel = (config.block_n, config.block_k, config.num_warps, config.num_stages, config.max_registers)
        kernel += (config.resident or config.block_d, choice.splits)
        assert kernels.setdefault(choice.label, kernel) == kernel


def test_neighbours_differ_in_one_property() -> None:
    found = {choice.label for choice in neighbours(Choice(LOOPED), BARS[0])}
    assert all(("pieces of" in label) and ("parts" not in label) for label in found)
    assert any(f"pieces of {piece}" in label for label in found for piece in (32, 64, 128))
    assert not any("pieces of" in choice.label for choice in neighbours(Choice(RESIDENT), BARS[0]))
    assert {choice.splits for choice in neighbours(Choice(LOOPED), SMALL[0])} == {None, 1, 2, 4, 8, 16}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("splits", [None, 1, 3, 16])
def test_a_plan_covers_all_codes(shape: tuple[int, int, int], splits: int | None) -> None:
    plan = Choice(LOOPED, splits).plan(shape, torch.device("cpu"))
    covered = plan.splits * plan.tiles_per_split * LOOPED.block_k
    assert covered >= shape[1] > covered - plan.tiles_per_split * LOOPED.block_k
    assert plan.tiles_per_split <= MAX_TILES_PER_SPLIT


def searching(answers: dict[int, object]) -> Any:
    """A stand-in for `search_with_plan` that for these block_n gives a wrong answer or raises."""

    def search_with_plan(x: Tensor, codebook: Tensor, prepared: list[Tensor], precision: str, plan: SearchPlan) -> Any:
        answer = answers.get(plan.config.block_n)
        if isinstance(answer, Exception):
            raise answer
        indices = brute_force_nearest(x, codebook)
        return (indices + 1 if answer == "wrong" else indices,)

    return search_with_plan


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(tiles, "prepare", lambda codebook: [])
    monkeypatch.setattr(tiles, "precompile", lambda cases, context: None)
    monkeypatch.setattr(tiles, "search_with_plan", searching({}))
    return monkeypatch


def test_a_wrong_and_a_broken_choice_are_said_and_not_chosen(
    context: Context, without_kernels: pytest.MonkeyPatch
) -> None:
    answers = {64: "wrong", 256: RuntimeError("out of resources: shared memory")}
    without_kernels.setattr(tiles, "search_with_plan", searching(answers))
    without_kernels.setattr(tiles, "_REHEARSED_CHOICES", 100)
    results = context.results("tiles")
    sweep(results, context, SHAPE)
    lines = [line for line in results.lines if line["op"] == "tile"]
    by_block_n = {block_n: {line["status"] for line in lines if line["config"]["block_n"] == block_n}
                  for block_n in (64, 128, 256)}  # fmt: skip
    assert by_block_n == {64: {"WRONG"}, 128: {"ok"}, 256: {"failed: RuntimeError: out of resources: shared memory"}}
    choice = next(results.matching(op="choice"))
    assert choice["best"].startswith("128 x")
    assert choice["ratio"] == choice["usual_ms"] / choice["best_ms"] >= 1
    assert fastest_choice(results, SHAPE).label == choice["best"]


def test_a_shape_is_gone_on_with(context: Context, without_kernels: pytest.MonkeyPatch) -> None:
    results = context.results("tiles")
    sweep(results, context, SHAPE)
    done = len(results.lines)
    sweep(context.results("tiles"), context, SHAPE)
    assert len(context.results("tiles").lines) == done
    kept = "".join(line for line in results.file.read_text().splitlines(keepends=True) if '"choice", "N"' not in line)
    results.file.write_text(kept)
    again = context.results("tiles")
    sweep(again, context, SHAPE)
    labels = [line["choice"] for line in again.matching(op="tile")]
    assert len(labels) == len(set(labels))
    assert again.has(op="choice")


def test_the_data_of_a_shape_are_the_same_each_time(context: Context) -> None:
    first, second = draw(SHAPE, context), draw(SHAPE, context)
    assert torch.equal(first.x, second.x)
    assert first.x.shape == (24, 16)
    assert first.codebook.shape == (40, 16)
