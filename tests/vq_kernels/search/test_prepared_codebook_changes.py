"""A `PreparedCodebook` whose codes change, and one that was made under `inference_mode`."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vq_kernels import (
    PreparedCodebook,
    ResidualVectorQuantizer,
    VectorQuantizer,
    nearest_code,
    nearest_code_topk,
    search_statistics,
    select_backend,
    vector_quantize,
)

Call = Callable[[Tensor, PreparedCodebook], object]
CALLS: list[Call] = [
    nearest_code,
    vector_quantize,
    search_statistics,
    select_backend,
    lambda x, prepared: nearest_code_topk(x, prepared, 2),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "change",
    [
        lambda codebook: codebook.add_(1),
        lambda codebook: codebook.data.add_(1),
        lambda codebook: codebook.detach().numpy().fill(0),
        lambda codebook: codebook[3, 2].fill_(torch.nan),
    ],
    ids=["in place", "data", "numpy", "one entry"],
)
def test_is_current(change: Callable[[Tensor], object]) -> None:
    codebook = draw(9, 4)
    codebook[5] = torch.nan
    prepared = PreparedCodebook.from_codebook(codebook)
    assert prepared.is_current(codebook)
    assert prepared.is_current(codebook.clone().requires_grad_())
    change(codebook)
    assert not prepared.is_current(codebook)
    assert PreparedCodebook.from_codebook(codebook).is_current(codebook)


def test_is_current_compares_shape_and_dtype() -> None:
    codebook = draw(9, 4)
    prepared = PreparedCodebook.from_codebook(codebook)
    for other in (codebook[:8], codebook.double(), codebook[:, :3], torch.empty(9, 4, device="meta")):
        assert not prepared.is_current(other)


@pytest.mark.parametrize("call", CALLS)
def test_writing_to_it_is_noticed(call: Call) -> None:
    x, prepared = draw(5, 4, seed=1), PreparedCodebook.from_codebook(draw(9, 4))
    call(x, prepared)
    prepared.codebook[0].zero_()
    with pytest.raises(RuntimeError, match="codebook was written to after it was prepared"):
        call(x, prepared)


def test_no_write_changes_a_search() -> None:
    x, prepared = draw(5, 4, seed=1), PreparedCodebook.from_codebook(draw(9, 4))
    expected = nearest_code(x, prepared)
    prepared.codebook.data.zero_()  # no tensor notices these
    prepared.codebook.numpy().fill(0)
    for found, part in zip(nearest_code(x, prepared), expected, strict=True):
        assert torch.equal(found, part)
    assert prepared.is_current(draw(9, 4))


def test_copies_may_be_searched() -> None:
    x, prepared = draw(5, 4, seed=1), PreparedCodebook.from_codebook(draw(9, 4))
    expected = nearest_code(x, prepared).indices
    saved = io.BytesIO()
    torch.save(prepared, saved)
    saved.seek(0)
    for other in (copy.copy(prepared), copy.deepcopy(prepared), torch.load(saved, weights_only=False)):
        assert torch.equal(nearest_code(x, other).indices, expected)
        assert other.is_current(prepared.codebook)


@pytest.mark.usefixtures("_fresh_compiler")
def test_in_a_compiled_function() -> None:
    x, prepared = draw(5, 4, seed=1), PreparedCodebook.from_codebook(draw(9, 4))
    compiled = torch.compile(lambda x: vector_quantize(x, prepared).indices, fullgraph=True)
    assert torch.equal(compiled(x), nearest_code(x, prepared).indices)


@pytest.mark.parametrize("from_inference_tensor", [False, True])
def test_made_under_inference_mode_it_serves_training(from_inference_tensor: bool) -> None:
    codebook = draw(9, 4)
    with torch.inference_mode():
        prepared = PreparedCodebook.from_codebook(codebook.clone() if from_inference_tensor else codebook)
    gradients = []
    for codes in (prepared, codebook):
        x = draw(20, 4, seed=1).requires_grad_()
        quantized, _, loss = vector_quantize(x, codes, commitment_weight=0.25)
        (quantized.square().sum() + loss).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_an_inference_tensor_serves_training() -> None:
    with torch.inference_mode():
        codebook = draw(9, 4)
    x = draw(20, 4, seed=1).requires_grad_()
    vector_quantize(x, codebook, commitment_weight=0.25).loss.backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    "quantizer",
    [VectorQuantizer(9, 4, init="normal"), ResidualVectorQuantizer(2, 9, 4, init="normal")],
    ids=["plain", "residual"],
)
@pytest.mark.parametrize("training", [False, True])
def test_modules_search_the_codes_as_they_are(quantizer: VectorQuantizer, training: bool) -> None:
    x = draw(20, 4, seed=1)
    quantizer.train(training)(x)
    quantizer.codebook.data.copy_(draw(*quantizer.codebook.shape, seed=2))
    codes = quantizer.codebook.detach().view(-1, 9, 4)[0].clone()  # the averages move after the search
    assert torch.equal(quantizer(x).indices.view(20, -1)[:, 0], nearest_code(x, codes).indices)
