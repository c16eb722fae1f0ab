"""Rows for dead codes: on one rank, and on two, where codes are those of one process with all rows."""

from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.vq_kernels.learning.dead_code_ranks import LAYERS, SIZES, STEPS, WORLD, make, rows, run, train
from vq_kernels import nearest_code
from vq_kernels.learning.dead_codes import draw_sampling, evenly_spaced_rows, random_replacements, random_rows


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(run, tmp_path_factory.mktemp("ranks"), world=WORLD)


@pytest.mark.parametrize("num_slots", [1, 3, 7, 20])
def test_slots_get_evenly_spaced_rows(num_slots: int) -> None:
    x = torch.arange(7.0)[:, None]
    torch.manual_seed(0)
    drawn = evenly_spaced_rows(
        x, None, torch.arange(num_slots), torch.tensor(num_slots), noise=0.0, dtype=torch.float32, synchronise=True
    )
    assert drawn.unique().numel() == min(num_slots, 7)
    steps = (drawn[1:] - drawn[:-1])[:, 0] % 7
    assert all(step in (7 // num_slots, -(-7 // num_slots)) for step in steps.tolist())


def test_random_rows_are_distinct_and_counted() -> None:
    rows = torch.arange(10.0)[:, None]
    counted = torch.arange(10) % 2 == 0
    drawn, found = random_rows(rows, counted, torch.randperm(10), torch.arange(7), synchronise=False)
    assert found.tolist() == [True] * 5 + [False] * 2
    assert sorted(drawn[found, 0].tolist()) == [0, 2, 4, 6, 8]
    drawn, found = random_rows(rows[:0], counted[:0], torch.randperm(0), torch.arange(7), synchronise=False)
    assert not found.any()
    assert not drawn.any()


def test_dead_codes_without_a_row_are_chosen_at_random() -> None:
    torch.manual_seed(0)
    dead = torch.tensor([True, False, True, True, True])
    times = torch.zeros(5)
    for _ in range(200):
        sampling = draw_sampling(2, torch.device("cpu"))
        two = torch.arange(2.0)[:, None], torch.ones(2).bool()
        drawn, replaced = random_replacements(dead, *two, sampling, synchronise=False)
        assert replaced.sum() == 2
        assert sorted(drawn[replaced, 0].tolist()) == [0, 1]
        times += replaced
    assert times[1] == 0
    assert (times[dead] > 60).all()
    assert not random_replacements(torch.zeros(5).bool(), *two, sampling, synchronise=False)[1].any()


@pytest.mark.parametrize("size", ["even", "uneven"])
@pytest.mark.parametrize("name", LAYERS)
def test_two_ranks_equal_one_process_with_all_rows(ranks: list[dict[str, Any]], name: str, size: str) -> None:
    expected = train(name, [torch.cat(rows(size, step)) for step in range(STEPS)])
    for rank in ranks:
        state = rank["same"][name, size]
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                state[key], value, rtol=1e-12, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
            )
    if "restart_after" in LAYERS[name]:
        assert expected["restarts"] > 0
    assert expected["batch_counts"].sum() == sum(SIZES[size])


def test_ranks_with_different_random_numbers_agree(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["unlike"] for rank in ranks)
    assert first["restarts"] > 0
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_rows_of_both_ranks_become_codes(ranks: list[dict[str, Any]]) -> None:
    assert torch.equal(ranks[0]["drawn"], ranks[1]["drawn"])
    chosen = nearest_code(ranks[0]["drawn"], torch.cat(rows("uneven", 0)))
    assert not chosen.sq_distances.any()
    from_first = chosen.indices < SIZES["uneven"][0]
    assert 0 < from_first.sum() < from_first.numel()


def test_a_codebook_waits_for_the_first_row_of_any_rank(ranks: list[dict[str, Any]]) -> None:
    (waits, before), (waits_on, after) = ranks[0]["waits"]
    assert waits
    assert torch.equal(before, make("both").codebook)
    assert not waits_on
    assert not torch.equal(after, before)
    assert torch.equal(after, ranks[1]["waits"][1][1])


def test_without_synchronisation_each_rank_is_alone(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["alone"]["needs_data"]
    assert not ranks[1]["alone"]["needs_data"]
    assert ranks[1]["alone"]["batch_counts"].sum() == SIZES["uneven"][1]


def test_no_graph_break_with_a_process_group(ranks: list[dict[str, Any]]) -> None:
    assert [rank["breaks"] for rank in ranks] == [0, 0]
