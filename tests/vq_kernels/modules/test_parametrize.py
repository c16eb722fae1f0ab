"""A codebook with a parametrization learns by gradients alone, or raises an error before anything is lost."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.vq_kernels.plain import residual_quantizer, vector_quantizer
from vq_kernels import VectorQuantize, VectorQuantizer, attach_count_normalised_step


class Doubled(nn.Module):
    def forward(self, codes: Tensor) -> Tensor:
        return 2 * codes

    def right_inverse(self, codes: Tensor) -> Tensor:
        return codes / 2


def doubled(module: nn.Module, name: str = "codebook") -> nn.Module:
    parametrize.register_parametrization(module, name, Doubled())
    return module


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


LEARNABLE: dict[str, Any] = {"learnable_codebook": True, "ema_update": False}
WRITES: dict[str, Callable[[], nn.Module]] = {
    "data": lambda: doubled(vector_quantizer(16, 4, init="data")),
    "k-means": lambda: doubled(residual_quantizer(2, 16, 4, init="kmeans")),
    "resets": lambda: doubled(vector_quantizer(16, 4, restart_after=5)),
    "averages": lambda: doubled(VectorQuantizer(16, 4)),
    "drop-in": lambda: _inside(VectorQuantize(4, 16, kmeans_init=True, **LEARNABLE)),
    "weight_norm": lambda: parametrizations.weight_norm(vector_quantizer(16, 4, init="data"), "codebook"),
    "pruning": lambda: prune.l1_unstructured(vector_quantizer(16, 4, init="data"), "codebook", amount=0.5),
}


def _inside(layer: VectorQuantize) -> VectorQuantize:
    doubled(layer._codebook, "embed")
    return layer


@pytest.mark.parametrize("name", WRITES)
def test_writing_to_it_is_refused_at_the_first_forward(name: str) -> None:
    module = WRITES[name]()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"must not (have a parametrization|be computed from other tensors)"):
        module(draw(40, 4))
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])


def test_set_codes_fit_and_the_optimizer_step_are_refused() -> None:
    quantizer = doubled(vector_quantizer(16, 4))
    optimizer = torch.optim.SGD(quantizer.parameters())
    for call in (
        lambda: quantizer.set_codes(torch.zeros(16, 4)),
        lambda: quantizer.fit(draw(40, 4)),
        lambda: attach_count_normalised_step(optimizer, quantizer),
    ):
        with pytest.raises(RuntimeError, match="codebook must not have a parametrization"):
            call()


@pytest.mark.parametrize("wrap", [doubled, lambda module: parametrizations.weight_norm(module, "codebook")])
def test_gradients_pass_through_it(wrap: Callable[[nn.Module], nn.Module]) -> None:
    codes, x = draw(16, 4), draw(40, 4) + 1
    plain, wrapped = (VectorQuantizer(16, 4, init=codes, restart_after=0, ema_decay=None) for _ in range(2))
    wrap(wrapped)
    expected, found = plain(x), wrapped(x)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.quantized, expected.quantized)
    expected.loss.backward()
    originals = list(wrapped.parameters())
    through = torch.autograd.grad(wrapped.codebook, originals, plain.codebook.grad)
    for found_gradient, gradient in zip(torch.autograd.grad(found.loss, originals), through, strict=True):
        torch.testing.assert_close(found_gradient, gradient)


def test_other_methods_use_the_parametrized_codes() -> None:
    quantizer = doubled(vector_quantizer(16, 4)).eval()
    x = draw(40, 4)
    assert torch.equal(quantizer.encode(x), quantizer(x).indices)
    assert torch.equal(quantizer.decode(quantizer.encode(x)), quantizer(x).quantized)
