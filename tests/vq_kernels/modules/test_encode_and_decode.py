"""Indices to store: `encode` in every integer dtype, and `decode` of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vq_kernels.plain import residual_quantizer, vector_quantizer
from vq_kernels.modules.indices import INDEX_DTYPES

D = 4
LEARNING: dict[str, Any] = {"init": "data", "restart_after": 1, "ema_decay": 0.8, "warn": False}
MODULES = {
    "plain": lambda k: vector_quantizer(k, D, init="normal", ema_decay=None),
    "cosine, heads": lambda k: vector_quantizer(k, D, metric="cosine", heads=2, separate_codebooks=True, **LEARNING),
    "one stage": lambda k: residual_quantizer(1, k, D, **LEARNING),
    "residual, heads": lambda k: residual_quantizer(3, k, D, heads=2, quantizer_dropout=0.5, **LEARNING),
}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_encode_gives_the_indices_of_eval_mode_and_decode_takes_them(
    name: str, dtype: torch.dtype, training: bool
) -> None:
    torch.manual_seed(0)
    module: Any = MODULES[name](100)
    x = draw(3, 7, D * module.heads).requires_grad_()
    expected = module.eval()(x)
    module.train(training)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    indices = module.encode(x, dtype=dtype)
    assert indices.dtype == dtype
    assert torch.equal(indices.long(), expected.indices)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key
    decoded = module.decode(indices)
    if "cosine" not in name:
        assert torch.equal(decoded, expected.quantized)
    assert torch.equal(decoded, module.decode(expected.indices))
    assert torch.equal(decoded, module.get_codebook_entry(indices))
    codes = module.get_codes_from_indices(indices)
    assert torch.equal(codes.sum(dim=0) if codes.dim() > decoded.dim() else codes, decoded)


def test_padding_needs_a_signed_dtype() -> None:
    module = MODULES["plain"](100)
    x, mask = draw(3, 7, D), torch.arange(7) < torch.tensor([7, 2, 0])[:, None]
    indices = module.encode(x, mask, dtype=torch.int8)
    assert torch.equal(indices.long(), module.eval()(x, mask).indices)
    assert not module.decode(indices)[~mask].any()
    with pytest.raises(ValueError, match=r"dtype must be signed with a mask, .* got torch.uint8"):
        module.encode(x, mask, dtype=torch.uint8)


def test_a_dtype_that_does_not_hold_the_indices_is_refused() -> None:
    x = draw(5, D)
    assert MODULES["plain"](256).encode(x, dtype=torch.uint8).dtype == torch.uint8
    with pytest.raises(ValueError, match=r"dtype must hold the indices of num_codes=257, got torch.uint8"):
        MODULES["plain"](257).encode(x, dtype=torch.uint8)
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(TypeError, match=f"dtype must be an integer dtype, got {dtype}"):
            MODULES["plain"](2).encode(x, dtype=dtype)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("value", [-2, 100, 255])
def test_decode_refuses_indices_out_of_range(name: str, value: int) -> None:
    module: Any = MODULES[name](100)
    indices = module.encode(draw(5, D * module.heads))
    indices.view(-1)[3] = value
    with pytest.raises(ValueError, match=rf"indices must be in \[0, 100\), or -1 for padding, got {value}"):
        module.decode(indices)
    with pytest.raises(TypeError, match=r"indices must have an integer dtype, got torch.float32"):
        module.decode(indices.float())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_encode_and_decode_compile_and_export() -> None:
    module = MODULES["residual, heads"](100)
    x = draw(5, 2 * D)

    def there_and_back(x: Tensor) -> Tensor:
        decoded: Tensor = module.decode(module.encode(x, dtype=torch.uint8))
        return decoded

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), there_and_back(x))

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantizer = module

        def forward(self, indices: Tensor) -> Tensor:
            decoded: Tensor = self.quantizer.decode(indices)
            return decoded

    stored = module.encode(x, dtype=torch.int16)
    for strict in (False, True):
        exported = torch.export.export(Decoder(), (stored,), strict=strict).module()
        assert torch.equal(exported(stored), module.decode(stored))
