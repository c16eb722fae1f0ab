"""Two ranks, with layers created before the process group, keep the codebook of a single process."""

from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.vq_kernels.compat.side_by_side import assert_all_close
from tests.vq_kernels.compat.two_ranks import LAYERS, WORLD, batches, make, run
from vq_kernels import nearest_code


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(run, tmp_path_factory.mktemp("ranks"), world=WORLD)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "alone"])
def test_both_ranks_have_the_same_codebook(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank["states"][name] for rank in ranks)
    for key in first:
        if key.startswith("_codebook"):
            assert torch.equal(first[key], second[key]), key


@pytest.mark.parametrize("name", ["default", "cosine"])
def test_codebook_equals_that_of_one_process_with_all_rows(ranks: list[dict[str, Any]], name: str) -> None:
    layer = make(name)
    for both in zip(*(batches(rank) for rank in range(WORLD)), strict=True):
        layer(torch.cat([x for x, _ in both], dim=1), mask=torch.cat([mask for _, mask in both], dim=1))
    assert_all_close(ranks[0]["states"][name], layer.state_dict())


def test_without_synchronisation_each_rank_learns_alone(ranks: list[dict[str, Any]]) -> None:
    for rank in range(WORLD):
        layer = make("alone")
        for x, mask in batches(rank):
            layer(x, mask=mask)
        assert_all_close(ranks[rank]["states"]["alone"], layer.state_dict())
    codes = [rank["states"]["alone"]["_codebook.embed"] for rank in ranks]
    assert not torch.equal(*codes)


def test_dead_codes_are_reset_to_rows_of_both_ranks(ranks: list[dict[str, Any]]) -> None:
    codes = ranks[0]["states"]["many dead codes"]["_codebook.embed"][0]
    for rank in range(WORLD):
        x, mask = batches(rank)[-1]
        assert (nearest_code(x[mask], codes).sq_distances == 0).sum() >= 5


def test_k_means_counts_the_rows_of_both_ranks(ranks: list[dict[str, Any]]) -> None:
    state = ranks[0]["states"]["k-means"]
    assert state["_codebook.initted"]
    num_rows = sum(int(mask.sum()) for rank in range(WORLD) for _, mask in batches(rank)[:1])
    torch.testing.assert_close(state["_codebook.cluster_size"].sum(dim=1), torch.full((2,), float(num_rows)))


def test_no_graph_break_with_a_process_group(ranks: list[dict[str, Any]]) -> None:
    assert [rank["graph_breaks"] for rank in ranks] == [0, 0]
