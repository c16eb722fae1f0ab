"""torch.jit.trace, then save, load and run: the same results in eval mode, an error in training mode."""

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vq_kernels import ResidualVectorQuantizer, VectorQuantize, VectorQuantizer

MODULES: dict[str, Callable[[], nn.Module]] = {
    "averages": lambda: VectorQuantizer(20, 6),
    "learnable": lambda: VectorQuantizer(20, 6, ema_decay=None),
    "cosine": lambda: VectorQuantizer(20, 6, metric="cosine"),
    "product": lambda: VectorQuantizer(20, 3, heads=2, separate_codebooks=True),
    "cosine, heads": lambda: VectorQuantizer(20, 3, metric="cosine", heads=2, separate_codebooks=True),
    "residual": lambda: ResidualVectorQuantizer(3, 20, 6, quantizer_dropout=0.5),
    "residual, learnable": lambda: ResidualVectorQuantizer(3, 20, 6, ema_decay=None),
    "drop-in": lambda: VectorQuantize(6, 20),
    "drop-in, frozen": lambda: VectorQuantize(6, 20, freeze_codebook=True),
    "drop-in, projected": lambda: VectorQuantize(6, 20, use_cosine_sim=True, codebook_dim=5, heads=2),
    "drop-in, learnable": lambda: VectorQuantize(6, 20, learnable_codebook=True, ema_update=False),
    "drop-in, k-means": lambda: VectorQuantize(6, 20, kmeans_init=True),
}


def draw(num_rows: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, 6, generator=torch.Generator().manual_seed(seed))


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[name]()


def traced(module: nn.Module, *inputs: Tensor) -> Callable[..., Any]:
    """Traces, saves and loads a module."""
    file = io.BytesIO()
    with warnings.catch_warnings():  # FutureWarning: deprecated; TracerWarning: shapes that our code reads
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(module, inputs), file)
        file.seek(0)
        loaded: Callable[..., Any] = torch.jit.load(file)
    return loaded


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_a_trace_gives_the_same(name: str, needs_gradient: bool) -> None:
    module = make(name)
    module(draw(30))
    loaded = traced(module.eval(), draw(30).requires_grad_(needs_gradient))
    for num_rows in (30, 50):
        x = draw(num_rows, seed=1)
        for found, expected in zip(loaded(x), module(x), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["averages", "residual"])
def test_a_trace_with_a_mask(name: str) -> None:
    module = make(name)
    module(draw(30)[None])
    mask = torch.arange(30)[None] < 20
    loaded = traced(module.eval().requires_grad_(False), *(draw(30)[None], mask))
    for found, expected in zip(loaded(draw(30)[None], ~mask), module(draw(30)[None], mask=~mask), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", MODULES)
def test_training_mode_is_refused_before_anything_changes(name: str) -> None:
    module = make(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"in training mode .* call eval\(\) first, or use torch\.export"):
        traced(module, draw(30))
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_layer_that_is_traced_before_k_means_says_so() -> None:
    module = make("drop-in, k-means").eval()
    with pytest.raises(RuntimeError, match="before k-means; call it on a batch"):
        traced(module, draw(30))
    assert not module._codebook.initted
