"""The state of a codebook: the names that earlier versions saved still load."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.vq_kernels.plain import residual_quantizer, vector_quantizer
from vq_kernels import VectorQuantize

K, D = 8, 6


def saved_by_quantizer(*leading: int) -> dict[str, Any]:
    """The shapes and dtypes in a state dict of VectorQuantizer or ResidualVectorQuantizer."""
    counts = dict.fromkeys(("steps_unused", "batch_counts", "usage_counts"), ((*leading, K), torch.int64))
    return {
        "codebook": ((*leading, K, D), torch.float32),
        **counts,
        "restarts": ((), torch.int64),
        "needs_data": (leading, torch.float32),
    }


def saved_averages(*leading: int) -> dict[str, Any]:
    return {"cluster_sizes": ((*leading, K), torch.float32), "cluster_sums": ((*leading, K, D), torch.float32)}


def saved_by_compat(num_codebooks: int) -> dict[str, Any]:
    return {
        "_codebook.initted": ((), torch.float32),
        "_codebook.cluster_size": ((num_codebooks, K), torch.float32),
        "_codebook.embed_avg": ((num_codebooks, K, D), torch.float32),
        "_codebook.embed": ((num_codebooks, K, D), torch.float32),
    }


PROJECTIONS = {
    "project_in.weight": ((D, 10), torch.float32),
    "project_in.bias": ((D,), torch.float32),
    "project_out.weight": ((10, D), torch.float32),
    "project_out.bias": ((10,), torch.float32),
}
LEARNABLE = {"learnable_codebook": True, "ema_update": False, "threshold_ema_dead_code": 1}


@pytest.mark.parametrize(
    ("module", "saved"),
    [
        (vector_quantizer(K, D, restart_after=2), saved_by_quantizer()),
        (vector_quantizer(K, D, ema_decay=0.9), saved_by_quantizer() | saved_averages()),
        (vector_quantizer(K, D, heads=2, separate_codebooks=True), saved_by_quantizer(2)),
        (residual_quantizer(3, K, D, init="data"), saved_by_quantizer(3)),
        (
            residual_quantizer(3, K, D, ema_decay=0.9, heads=2, separate_codebooks=True),
            saved_by_quantizer(2, 3) | saved_averages(2, 3),
        ),
        (VectorQuantize(D, K), saved_by_compat(1)),
        (VectorQuantize(D, K, **LEARNABLE), saved_by_compat(1)),
        (VectorQuantize(10, K, codebook_dim=D, kmeans_init=True), saved_by_compat(1) | PROJECTIONS),
        (VectorQuantize(2 * D, K, heads=2, separate_codebook_per_head=True, codebook_dim=D), saved_by_compat(2)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_earlier_state_dicts_load(module: nn.Module, saved: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randint(0, 2, shape, generator=generator).to(dtype) for name, (shape, dtype) in saved.items()}
    module.load_state_dict(state)
    found = module.state_dict()
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
