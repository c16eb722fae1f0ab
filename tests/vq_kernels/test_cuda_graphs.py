"""What CUDA graphs may capture: operators that do not wait for the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vq_kernels import ResidualVectorQuantizer, VectorQuantizer
from vq_kernels.modules.base import QuantizerBase
from vq_kernels.search import backend

WAITING = (
    *("nearest_code", "nearest_code_topk", "most_similar_code", "codebook_gradient", "kmeans_if_needed", "draw_start"),
    *("is_original", "copy_to_search"),
)
CAPTURED = (
    *("nearest_code_triton", "codebook_gradient_triton", "copy"),
    *("code_cross_entropy", "code_cross_entropy_backward"),
)


@pytest.mark.parametrize("name", WAITING + CAPTURED)
def test_operators_that_wait_for_the_device_split_cuda_graphs(name: str) -> None:
    tags = getattr(torch.ops.vq_kernels, name).default.tags
    assert (torch.Tag.cudagraph_unsafe in tags) == (name in WAITING)


def test_every_operator_is_listed() -> None:
    names = {
        schema.name.removeprefix("vq_kernels::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("vq_kernels::")
    }
    assert names == {*WAITING, *CAPTURED}


QUANTIZERS: dict[str, Callable[[], QuantizerBase]] = {
    "moving averages": lambda: VectorQuantizer(16, 8),
    "gradients": lambda: VectorQuantizer(16, 8, ema_decay=None, restart_after=3, commitment_weight=0.0),
    "residual": lambda: ResidualVectorQuantizer(2, 16, 8, quantizer_dropout=0.5),
    "cosine": lambda: VectorQuantizer(16, 8, metric="cosine", heads=2, separate_codebooks=True),
}


class HostAccess(TorchDispatchMode):
    """Collects the operators that wait for the device, or copy between it and the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))  # of fake tensors: raises if the host needs their values
        on_host = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor) and not t.is_cuda]
        if on_host or torch.Tag.cudagraph_unsafe in func.tags:
            self.found.add(str(func))
        return result


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_forward_pass_of_training_does_not_wait_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_is_triton", lambda *_: True)  # without a GPU to ask for
    with FakeTensorMode(), torch.device("cuda"):
        quantizer = QUANTIZERS[name]()
        x = torch.zeros(40, 8 * quantizer.heads, requires_grad=True)
        with HostAccess() as host:
            quantizer(x)
    assert host.found <= {"vq_kernels.copy_to_search.default"}  # it only waits in a recomputation
