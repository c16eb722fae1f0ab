"""The PyTorch backend: memory for uncertified rows, and the error of precision="fast"."""

import pytest
import torch

from tests.vq_kernels.search.memory import extra_mib
from vq_kernels import nearest_code


@pytest.mark.parametrize(
    "call",
    [
        "nearest_code(x, torch.ones_like(codebook), backend='torch')",
        "nearest_code(x, torch.full_like(codebook, torch.nan), backend='torch')",
        "nearest_code(x.copy_(codebook[0]), codebook, backend='torch')",
        "nearest_code_topk(x, torch.ones_like(codebook), 1)",
    ],
    ids=["equal codes", "no finite code", "no distance", "topk"],
)
def test_memory_does_not_grow_with_the_uncertified_rows(call: str) -> None:
    num_rows, code_dim = 1 << 18, 64
    outputs_mib = num_rows * (4 * code_dim + 12) / (1 << 20)  # codes, indices, distances
    assert extra_mib(call, num_rows, 32, code_dim) < outputs_mib + 64


@pytest.mark.parametrize("far", [0.0, 1e3, 1e5])
def test_error_of_fast_is_within_the_documented_bound(far: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(3000, 16, generator=generator), torch.randn(500, 16, generator=generator)
    codebook[7] += far
    fast = nearest_code(x, codebook, backend="torch", precision="fast")
    exact = nearest_code(x, codebook, backend="torch")
    fast_sq, exact_sq = ((x.double() - found.codes.double()).square().sum(dim=1) for found in (fast, exact))
    mean = codebook.double().mean(dim=0)
    x_norm, code_norm = (x - mean).norm(dim=1), (fast.codes - mean).norm(dim=1)
    excess = fast_sq - exact_sq
    assert (excess <= 1.1 * (16 + 16) * 2.0**-22 * code_norm * (x_norm + code_norm)).all()
    assert (excess > 0).any() == (far == 1e5)  # the bound is tested there
