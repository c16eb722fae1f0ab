"""Under FSDP2 and FSDP1, quantizers train as under DistributedDataParallel, or raise an error that says what to do."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from tests.vq_kernels.modules.sharded_ranks import (
    FOLLOW_MEANS,
    LEARN_BY_GRADIENTS,
    LEAVE_OUT,
    SHARD,
    WRITE_TO_A_PARAMETER,
    run,
)


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run, args=(request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize(
    ("name", "way"), [*product(FOLLOW_MEANS | LEARN_BY_GRADIENTS, SHARD), *product(WRITE_TO_A_PARAMETER, LEAVE_OUT)]
)
def test_training_sharded_or_left_out_equals_ddp(ranks: list[dict[Any, Any]], name: str, way: str) -> None:
    for rank in ranks:
        for key, value in rank[name, "ddp"].items():
            torch.testing.assert_close(rank[name, way][key], value, msg=key)


@pytest.mark.parametrize("way", SHARD)
@pytest.mark.parametrize("name", WRITE_TO_A_PARAMETER)
def test_writing_to_a_sharded_codebook_is_refused(ranks: list[dict[Any, Any]], name: str, way: str) -> None:
    for rank in ranks:
        error, unchanged = rank[name, way]
        assert "must not be sharded" in error
        assert "ignored_params=set(quantizer.parameters())" in error
        assert unchanged


def test_a_sharded_codebook_is_refused_outside_of_the_forward(ranks: list[dict[Any, Any]]) -> None:
    for rank in ranks:
        for way in ["fsdp2", "fsdp1"][: len(ranks)]:
            for name, error in rank["outside", way].items():
                assert "leave the quantizer out of sharding" in error, (way, name)


def test_averages_of_half_precision_are_refused(ranks: list[dict[Any, Any]]) -> None:
    for rank in ranks:
        for error in rank["narrow"]:
            assert "must be float32 or wider, got torch.bfloat16; set no buffer_dtype" in error
