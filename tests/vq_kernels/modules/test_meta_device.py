"""Modules on the meta device, then `load_state_dict(assign=True)`."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vq_kernels import ResidualVectorQuantizer, VectorQuantize, VectorQuantizer

MODULES: dict[str, Callable[[], nn.Module]] = {
    "averages": lambda: VectorQuantizer(20, 6),
    "learnable": lambda: VectorQuantizer(20, 6, ema_decay=None),
    "frozen": lambda: VectorQuantizer(20, 6, ema_decay=None, freeze_codebook=True, warn=False),
    "product": lambda: VectorQuantizer(20, 3, heads=2, separate_codebooks=True),
    "residual": lambda: ResidualVectorQuantizer(3, 20, 6),
    "drop-in": lambda: VectorQuantize(6, 20, threshold_ema_dead_code=2),
    "drop-in, projected": lambda: VectorQuantize(6, 20, use_cosine_sim=True, codebook_dim=5, heads=2),
    "drop-in, learnable": lambda: VectorQuantize(6, 20, learnable_codebook=True, ema_update=False),
    "drop-in, k-means": lambda: VectorQuantize(6, 20, kmeans_init=True),
}


def train(module: nn.Module, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(30, 6, requires_grad=True)
    quantized, indices, loss = module(x)
    (quantized.square().sum() + loss).backward()
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return [quantized.detach(), indices, loss.detach(), *gradients]


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODULES[name]()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_a_loaded_module_trains_like_the_original(name: str, trained: bool) -> None:
    torch.manual_seed(0)
    module, loaded = MODULES[name](), on_meta(name)
    if trained:
        train(module, 0)
        module.zero_grad()
    loaded.load_state_dict({key: value.clone() for key, value in module.state_dict().items()}, assign=True)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    requires_grad = [parameter.requires_grad for parameter in module.parameters()]
    assert [parameter.requires_grad for parameter in loaded.parameters()] == requires_grad
    for step in range(3):
        for found, expected in zip(train(loaded, step), train(module, step), strict=True):
            assert torch.equal(found, expected)
    for key, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_missing_averages_are_made_from_the_codes() -> None:
    codes = torch.randn(20, 6)
    saved = VectorQuantizer.from_codebook(codes, ema_decay=None).state_dict()
    loaded = on_meta("averages")
    loaded.load_state_dict(saved, assign=True, strict=False)
    assert torch.equal(loaded.codebook, codes)
    assert torch.equal(loaded.cluster_sums / loaded.cluster_sizes[:, None], codes)
    train(loaded, 0)
    assert loaded.codebook.isfinite().all()
