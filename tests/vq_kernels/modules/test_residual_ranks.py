"""Two ranks with different rows keep the codebooks of one process, in every stage."""

from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.vq_kernels.modules.residual_ranks import LAYERS, STEPS, WORLD, batches, make, run


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(run, tmp_path_factory.mktemp("ranks"), world=WORLD)


@pytest.mark.parametrize("name", LAYERS)
def test_both_ranks_have_the_same_state(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank["states"][name] for rank in ranks)
    for key in first:
        assert torch.equal(first[key], second[key]), key
    if "restart_after" in LAYERS[name]:
        assert first["restarts"] > 0
        assert not first["needs_data"].any()


def test_averages_equal_those_of_one_process_with_all_rows(ranks: list[dict[str, Any]]) -> None:
    layer = make("averages")
    for both in zip(*(batches(rank, 4) for rank in range(WORLD)), strict=True):
        layer(torch.cat([x for x, _ in both]), torch.cat([mask for _, mask in both]))
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(ranks[0]["states"]["averages"][key], value, msg=key)


def test_both_ranks_drop_the_same_stages(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["stages"] for rank in ranks)
    assert len(first) == STEPS
    assert first[:-1] == second[:-1]
    assert len(set(first)) > 1
