"""Devices without float64 use the CPU instead. The tests report the CPU as such a device, once."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from vq_kernels import cosine, nearest_code, nearest_code_topk, perplexity, vector_quantize
from vq_kernels.gradient import autograd
from vq_kernels.modules import codebook as codebook_module
from vq_kernels.search import api, topk
from vq_kernels.search.backend import choose_backend, has_float64


def gradient_of_the_codebook(x: Tensor, codebook: Tensor) -> Tensor:
    codebook = codebook.clone().requires_grad_()
    return torch.autograd.grad(vector_quantize(x, codebook).loss, codebook)[0]


@pytest.mark.parametrize(
    ("module", "call"),
    [
        (api, lambda x, codebook: nearest_code(x, codebook).indices),
        (topk, lambda x, codebook: nearest_code_topk(x, codebook, 3).indices),
        (autograd, gradient_of_the_codebook),
        (cosine, lambda x, codebook: cosine.most_similar_code(x, codebook).indices),
        (codebook_module, lambda x, codebook: perplexity(nearest_code(x, codebook).indices.bincount()).float()),
    ],
    ids=["search", "topk", "gradient", "cosine", "perplexity"],
)
def test_results_are_the_same_without_float64(
    module: ModuleType, call: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(50, 8, generator=generator), torch.randn(20, 8, generator=generator)
    expected = call(x, codebook)
    asked: list[torch.device] = []

    def none_at_first(device: torch.device) -> bool:
        asked.append(device)
        return len(asked) > 1

    monkeypatch.setattr(module, "has_float64", none_at_first)
    found = call(x, codebook)
    assert torch.equal(found, expected)
    assert len(asked) >= 2


def test_mps_has_no_float64() -> None:
    class OnMps:
        device, dtype = torch.device("mps"), torch.float64

    assert not has_float64(OnMps.device)
    name, reason = choose_backend(OnMps(), OnMps())  # type: ignore[arg-type]
    assert (name, reason) == ("torch", "it runs on the CPU, as mps has no float64")
