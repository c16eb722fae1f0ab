"""The rows of the exactness stage, its reference, and that it would see a wrong answer."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu import exactness
from gpu.exactness import PARTS, TURNS, Count, check_block, summary
from gpu.exactness_data import Part, drawn_blocks, num_patches, patch_blocks, patches, rehearsed
from gpu.reference import float64_nearest
from gpu.results import Results, make_header
from gpu.stage import FINISHED, Context
from torch import Tensor

from vq_kernels.search.api import nearest_code_op
from vq_kernels.search.reference import brute_force_nearest

CPU = torch.device("cpu")
DRAWN = [part for part in PARTS if part.kind not in ("patches", "embeddings")]


def pair(part: Part, seed: int = 0) -> tuple[Tensor, Tensor]:
    return next(drawn_blocks(part, part.rows, seed, CPU))


def context(out: Path, seconds: float = 600.0) -> Context:
    header = make_header((), "abc", rehearse=True)
    return Context(out=out, work=out, header=header, deadline=time.monotonic() + seconds, rehearse=True)


# -- the rows


def test_there_are_a_billion_rows_without_any_picture() -> None:
    assert sum(part.rows for part in DRAWN) >= 10**9


@pytest.mark.parametrize("part", DRAWN, ids=lambda part: part.name)
def test_drawn_rows_are_as_their_part_says(part: Part) -> None:
    small = rehearsed(part)
    x, codebook = pair(small)
    assert x.shape == (24, small.code_dim)
    assert codebook.shape == (40, small.code_dim)
    assert x.dtype == codebook.dtype == part.dtype
    assert x.stride(0) == small.code_dim + part.pad_columns
    again, other = pair(small), pair(small, seed=1)
    assert torch.equal(x, again[0])
    assert torch.equal(codebook, again[1])
    assert not torch.equal(x, other[0])
    if part.offset:
        assert x.float().mean() == pytest.approx(part.offset, abs=0.5)


def test_half_of_the_duplicates_are_copies() -> None:
    codebook = pair(rehearsed(next(part for part in PARTS if part.kind == "duplicates")))[1]
    assert codebook.unique(dim=0).shape[0] == 20


def test_near_duplicates_differ_in_one_bit() -> None:
    codebook = pair(rehearsed(next(part for part in PARTS if part.kind == "near-duplicates")))[1]
    flipped = codebook[0::2].view(torch.int32) ^ codebook[1::2].view(torch.int32)
    assert torch.equal(flipped.sum(dim=1), torch.ones(20, dtype=torch.int64))


def test_blocks_hold_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu.exactness_data.BLOCK_ROWS", 10)
    blocks = list(drawn_blocks(rehearsed(DRAWN[0]), 24, 0, CPU))
    assert [x.shape[0] for x, _ in blocks] == [10, 10, 4]
    assert not torch.equal(blocks[0][1], blocks[1][1])


def test_patches_are_cut_at_every_place_and_mirrored() -> None:
    pictures = torch.randint(256, (2, 3, 5, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert num_patches(pictures, 4) == 2 * 2 * (2 * 3)
    cut = patches(pictures, 4)
    assert torch.equal(cut[4], pictures[0, :, 1:5, 1:5].reshape(-1) / 255)
    part = Part("patches", "patches", 4, 48, torch.float32, 24)
    rows = torch.cat([x for x, _ in patch_blocks(part, slice(0, 24), 0, pictures)])
    assert torch.equal(rows, torch.cat([cut, patches(pictures.flip(3), 4)]))
    parts = [x for turn in range(3) for x, _ in patch_blocks(part, slice(8 * turn, 8 * turn + 8), 0, pictures)]
    assert torch.equal(torch.cat(parts), rows)


# -- the reference


@pytest.mark.parametrize("part", DRAWN, ids=lambda part: part.name)
def test_the_reference_is_brute_force(part: Part) -> None:
    x, codebook = pair(rehearsed(part))
    assert torch.equal(float64_nearest(x, codebook), brute_force_nearest(x, codebook))


def test_the_reference_decides_what_a_float64_product_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(float64_nearest.__globals__["_SCORES"], "cpu", 64)  # several parts
    monkeypatch.setitem(float64_nearest.__globals__, "_PAIR_NUMBERS", 16)
    generator = torch.Generator().manual_seed(0)
    codebook = 1e6 + torch.randn(16, 4, generator=generator)
    codebook[8:] = codebook[:8]
    x = codebook[torch.randint(16, (50,), generator=generator)]
    found = float64_nearest(x, codebook)
    assert torch.equal(found, brute_force_nearest(x, codebook))
    assert found.max() < 8


# -- the check


def searched(x: Tensor, codebook: Tensor) -> list[Tensor]:
    return list(nearest_code_op(x, codebook, [], "torch", "exact"))


@pytest.mark.parametrize("broken", ["nothing", "index", "code", "distance", "nan"])
def test_a_wrong_answer_is_seen(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    x, codebook = pair(rehearsed(PARTS[0]))
    reference = brute_force_nearest(x, codebook)
    result = searched(x, codebook)
    if broken == "index":
        result[0][5] = (result[0][5] + 1) % 40
    elif broken == "code":
        result[1][5, 2] += 1e-6
    elif broken != "nothing":
        result[2][5] = torch.nan if broken == "nan" else result[2][5] * 1.0001
    monkeypatch.setattr(exactness, "nearest_code_op", lambda *arguments: tuple(result))
    count = Count()
    wrong, _ = check_block(x, codebook, reference, count)
    assert wrong.nonzero()[:, 0].tolist() == ([5] if broken == "index" else [])
    assert count.rows == count.proved + count.resolved + count.drained == 24
    assert count.wrong == (broken == "index")
    assert count.wrong_codes == (broken in ("index", "code"))
    assert count.wrong_distances == (broken in ("index", "distance", "nan"))


def test_the_stage_stops_in_time_and_says_what_is_left(tmp_path: Path) -> None:
    outcome = exactness.run(context(tmp_path, seconds=1.0))
    assert outcome.startswith("0 rows done, none wrong; about")
    assert outcome.endswith("no time left")
    assert not (tmp_path / "exactness.jsonl").exists()


def test_one_wrong_row_fails_the_stage(tmp_path: Path) -> None:
    results = Results(tmp_path / "exactness.jsonl", make_header((), "abc", rehearse=True))
    clean = {"wrong": 0, "wrong_codes": 0, "wrong_distances": 0, "reference_wrong": 0}
    part = PARTS[0]
    for turn in range(TURNS):
        results.add(part=part.name, turn=turn, rows=part.rows // TURNS, **clean)
    assert summary(results, (part,), TURNS, "") == FINISHED
    assert "about" in summary(results, PARTS[:2], TURNS, "no time left")
    results.add(part=part.name, turn=0, rows=1, **{**clean, "wrong": 1})
    assert summary(results, (part,), TURNS, "").startswith("failed: 1 wrong, 0 wrong_codes")


def test_examples_of_wrong_rows_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_everywhere(x: Tensor, codebook: Tensor, *rest: object) -> tuple[Tensor, ...]:
        result = searched(x, codebook)
        result[0] = (result[0] + 1) % codebook.shape[0]
        return tuple(result)

    monkeypatch.setattr(exactness, "nearest_code_op", wrong_everywhere)
    results = Results(tmp_path / "exactness.jsonl", make_header((), "abc", rehearse=True))
    exactness.do_turn(results, rehearsed(PARTS[0]), 0, drawn_blocks(rehearsed(PARTS[0]), 24, 0, CPU))
    line = SimpleNamespace(**results.lines[0])
    assert (line.wrong, line.reference_wrong, line.reference_rows) == (24, 0, 24)
    assert [example["row"] for example in line.examples] == [0, 1, 2]
    assert all(example["found"] == (example["expected"] + 1) % 40 for example in line.examples)
