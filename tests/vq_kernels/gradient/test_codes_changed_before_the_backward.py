"""Gradients are those of the codes of the forward pass, whatever happens to them before the backward."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vq_kernels import ResidualVectorQuantizer, VectorQuantize, VectorQuantizer, vector_quantize
from vq_kernels.cross_entropy import code_cross_entropy

CHANGES: dict[str, Callable[[Tensor], object]] = {
    "data": lambda codebook: codebook.data.add_(1),
    "numpy": lambda codebook: codebook.detach().numpy().fill(7),
    "in place": lambda codebook: codebook.detach().mul_(3),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drop_in() -> VectorQuantize:
    return VectorQuantize(4, 9, learnable_codebook=True, ema_update=False)


LEARNED: dict[str, Any] = {"init": "normal", "restart_after": 0, "ema_decay": None}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "vector_quantize": lambda x, codebook: vector_quantize(x, codebook, commitment_weight=0.25).loss,
    "cross-entropy": lambda x, codebook: code_cross_entropy(x, codebook, torch.arange(20) % 9),
    "dot cross-entropy": lambda x, codebook: code_cross_entropy(x, codebook, torch.arange(20) % 9, metric="dot"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)
def test_functions(loss_of: Callable[[Tensor, Tensor], Tensor], change: Callable[[Tensor], object]) -> None:
    x, codebook = draw(20, 4, seed=1).requires_grad_(), draw(9, 4).requires_grad_()
    expected = torch.autograd.grad(loss_of(x, codebook), (x, codebook))
    loss = loss_of(x, codebook)
    change(codebook)
    for found, gradient in zip(torch.autograd.grad(loss, (x, codebook)), expected, strict=True):
        assert torch.equal(found, gradient)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(
    "make",
    [
        lambda: VectorQuantizer(9, 4, **LEARNED),
        lambda: VectorQuantizer(9, 4, metric="cosine", **LEARNED),
        lambda: VectorQuantizer(9, 4, **LEARNED | {"ema_decay": 0.9}),
        lambda: ResidualVectorQuantizer(2, 9, 4, **LEARNED),
        drop_in,
    ],
    ids=["plain", "cosine", "averages", "residual", "drop-in"],
)
def test_modules(make: Callable[[], torch.nn.Module], change: Callable[[Tensor], object]) -> None:
    torch.manual_seed(0)
    original = make()
    gradients = []
    for changes in (False, True):
        module, x = copy.deepcopy(original), draw(1, 20, 4, seed=1).requires_grad_()
        quantized, _, loss = module(x)
        for tensor in module.state_dict(keep_vars=True).values():
            if changes and tensor.is_floating_point() and tensor.shape[-2:] == (9, 4):
                change(tensor)
        (quantized.square().sum() + loss.sum()).backward()
        gradients.append([x.grad, *(parameter.grad for parameter in module.parameters())])
    for found, expected in zip(*gradients, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("loss_of", [LOSSES["vector_quantize"], LOSSES["cross-entropy"]], ids=["quantize", "entropy"])
def test_compiled_functions(loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, codebook = draw(20, 4, seed=1).requires_grad_(), draw(9, 4).requires_grad_()
    expected = torch.autograd.grad(loss_of(x, codebook), (x, codebook))
    loss = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(x, codebook)
    codebook.data.add_(1)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, codebook)), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("kind", [VectorQuantizer, ResidualVectorQuantizer])
def test_compiled_modules(kind: type[VectorQuantizer | ResidualVectorQuantizer]) -> None:
    sizes = (9, 4) if kind == VectorQuantizer else (2, 9, 4)
    module, x = kind(*sizes, **LEARNED), draw(20, 4, seed=1).requires_grad_()
    expected = torch.autograd.grad(module(x).loss, (x, module.codebook))
    loss = torch.compile(module, fullgraph=True, backend="aot_eager")(x).loss
    module.codebook.data.add_(1)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, module.codebook)), expected, rtol=1e-5, atol=1e-7)
