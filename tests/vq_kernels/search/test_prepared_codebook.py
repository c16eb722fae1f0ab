"""`PreparedCodebook` in every function that takes a codebook."""

import pytest
import torch
from torch import Tensor

from vq_kernels import PreparedCodebook, nearest_code, nearest_code_topk, select_backend, vector_quantize


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 50, 8, generator=generator), torch.randn(60, 8, generator=generator)


def test_topk(pair: tuple[Tensor, Tensor]) -> None:
    x, codebook = pair
    found, expected = (nearest_code_topk(x, codes, 3) for codes in (PreparedCodebook.from_codebook(codebook), codebook))
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.sq_distances, expected.sq_distances)


def test_quantization_gives_a_gradient_to_x_only(pair: tuple[Tensor, Tensor]) -> None:
    x, codebook = pair
    x.requires_grad_()
    prepared = PreparedCodebook.from_codebook(codebook.requires_grad_())
    found, expected = (vector_quantize(x, codes, commitment_weight=0.25) for codes in (prepared, codebook))
    assert torch.equal(found.quantized, expected.quantized)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.loss, expected.loss)
    gradients = [torch.autograd.grad(result.quantized.square().sum() + result.loss, x) for result in (found, expected)]
    assert torch.equal(*(gradient for (gradient,) in gradients))
    assert not prepared.codebook.requires_grad


def test_backend_is_the_one_it_was_prepared_for(pair: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    x, codebook = pair
    prepared = PreparedCodebook.from_codebook(codebook)
    monkeypatch.setenv("VQ_KERNELS_BACKEND", "triton")
    assert select_backend(x, prepared) == ("llvm", "codebook was prepared for it")
    assert select_backend(x.double(), prepared) == ("torch", "codebook was prepared for it")
    assert torch.equal(nearest_code(x.double(), prepared).indices, nearest_code(x, codebook, backend="torch").indices)
    for call in (select_backend, vector_quantize):
        with pytest.raises(ValueError, match="backend must be 'auto' or 'llvm', which codebook was prepared for"):
            call(x, prepared, backend="triton")


def test_select_backend_checks_its_arguments(pair: tuple[Tensor, Tensor]) -> None:
    x, codebook = pair
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        select_backend([1.0], codebook)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 8\] to match codebook \(60, 8\), got \(2, 50, 7\)"):
        select_backend(x[..., 1:], codebook)
    with pytest.raises(TypeError, match=r"x must be a dense tensor, got one of layout torch\.sparse_coo"):
        select_backend(x[0].to_sparse(), codebook)
