"""Under FSDP2 and FSDP1, quantizers train as under DistributedDataParallel, or raise an error that says what to do."""

from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.vq_kernels.modules.sharded_ranks import run


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(run, tmp_path_factory.mktemp("ranks"), request.param, world=request.param)


@pytest.mark.parametrize("kind", ["sharded", "left out"])
def test_training_sharded_or_left_out_equals_ddp(ranks: list[dict[str, Any]], kind: str) -> None:
    for rank in ranks:
        assert rank[kind]
        for (name, way), found in rank[kind].items():
            for key, value in rank["ddp"][name].items():
                torch.testing.assert_close(found[key], value, msg=f"{name}, {way}: {key}")


def test_writing_to_a_sharded_codebook_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["refused"]
        for case, (error, unchanged) in rank["refused"].items():
            assert "must not be sharded" in error, case
            assert "ignored_params=set(quantizer.parameters())" in error, case
            assert unchanged, case


def test_a_sharded_codebook_is_refused_outside_of_the_forward(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(rank["outside"]) == len(ranks)
        for way, errors in rank["outside"].items():
            for name, error in errors.items():
                assert "leave the quantizer out of sharding" in error, (way, name)


def test_averages_of_half_precision_are_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for error in rank["narrow"]:
            assert "must be float32 or wider, got torch.bfloat16; set no buffer_dtype" in error
