"""Half-precision gradients whose differences do not fit their dtype."""

import pytest
import torch

from vq_kernels import ResidualVectorQuantizer, VectorQuantizer, vector_quantize
from vq_kernels.gradient.autograd import rotation_trick


@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("codebook_dtype", [torch.float16, torch.float32])
def test_commitment_gradient_of_a_difference_beyond_the_range(num_rows: int, codebook_dtype: torch.dtype) -> None:
    x = torch.full((num_rows, 2), 60_000.0, dtype=torch.float16, requires_grad=True)
    codebook = torch.tensor([[-60_000.0, 0.0]], dtype=codebook_dtype, requires_grad=True)
    vector_quantize(x, codebook, commitment_weight=0.25).loss.backward()
    expected = 2 * 0.25 / (num_rows * 2) * torch.tensor([120_000.0, 60_000.0])
    torch.testing.assert_close(x.grad.float(), expected.expand(num_rows, 2), rtol=2e-3, atol=0)
    expected = 2 / (num_rows * 2) * num_rows * torch.tensor([[-120_000.0, -60_000.0]])
    torch.testing.assert_close(codebook.grad, expected.to(codebook_dtype), rtol=2e-3, atol=0)


def test_small_differences_are_not_rounded_to_half_precision() -> None:
    x = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16, requires_grad=True)
    codebook = torch.tensor([[1.0 + 2.0**-10, 2.0 - 2.0**-12]])
    vector_quantize(x, codebook, commitment_weight=1.0).loss.backward()
    assert x.grad.tolist() == [[-(2.0**-10), 2.0**-12]]


@pytest.mark.parametrize("heads", [1, 2])
def test_modules(heads: int) -> None:
    for quantizer in (
        VectorQuantizer(1, 2, heads=heads, commitment_weight=0.25, init=torch.full((1, 2), -60_000.0)),
        ResidualVectorQuantizer(1, 1, 2, heads=heads, commitment_weight=0.25, init=torch.full((1, 1, 2), -60_000.0)),
    ):
        x = torch.full((1, 2 * heads), 60_000.0, dtype=torch.float16, requires_grad=True)
        quantizer(x).loss.backward()
        expected = torch.full_like(x, 2 * 0.25 / (2 * heads) * 120_000)
        torch.testing.assert_close(x.grad, expected, rtol=2e-3, atol=0)


def test_rotated_gradient_of_long_vectors() -> None:
    x = torch.tensor([[60_000.0, 60_000.0]], dtype=torch.float16, requires_grad=True)  # its norm is beyond the range
    codes = torch.tensor([[30_000.0, -30_000.0]], dtype=torch.float16)
    upstream = torch.tensor([[1.0, 0.0]], dtype=torch.float16)
    rotation_trick(x, codes).backward(upstream)
    torch.testing.assert_close(x.grad, torch.tensor([[0.0, 0.5]], dtype=torch.float16), rtol=2e-3, atol=1e-3)
