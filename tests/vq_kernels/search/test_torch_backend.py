"""The PyTorch backend: memory for uncertified rows."""

import pytest

from tests.vq_kernels.search.memory import extra_mib


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
