"""The quantizers of transformers with an exact search."""

import copy
import io
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vq_kernels.compat.transformers import patch, unpatch
from vq_kernels.search.reference import brute_force_nearest

pytest.importorskip("transformers", reason="needs transformers", exc_type=ImportError)

DIM, CODES = 16, 64
AUDIO = {"codebook_size": CODES, "codebook_dim": DIM, "hidden_size": DIM}
MIMI = AUDIO | {"vector_quantization_hidden_dimension": DIM, "num_quantizers": 4}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "encodec": ("EncodecResidualVectorQuantizer", "EncodecConfig", {**AUDIO, "target_bandwidths": [1.5]}),
    "mimi": ("MimiSplitResidualVectorQuantizer", "MimiConfig", MIMI),
    "xcodec": ("XcodecEuclideanCodebook", "XcodecConfig", {"codebook_size": CODES, "codebook_dim": DIM}),
    "wavtokenizer": ("WavTokenizerEuclideanCodebook", "WavTokenizerConfig", {"codebook_size": CODES}),
    "dac": ("DacResidualVectorQuantizer", "DacConfig", {**AUDIO, "n_codebooks": 3}),
    "chameleon": ("ChameleonVQVAEVectorQuantizer", "ChameleonVQVAEConfig", {"num_embeddings": CODES, "embed_dim": DIM}),
    "janus": ("JanusVQVAEVectorQuantizer", "JanusVQVAEConfig", {"num_embeddings": CODES, "embed_dim": DIM}),
    "glm_image": ("GlmImageVQVAEVectorQuantizer", "GlmImageVQVAEConfig", {"num_embeddings": CODES, "embed_dim": DIM}),
    "emu3": ("Emu3VQVAEVectorQuantizer", "Emu3VQVAEConfig", {"codebook_size": CODES, "embed_dim": DIM}),
}
each_case = pytest.mark.parametrize("case", CASES)


def make(case: str) -> Any:
    """Returns a quantizer of transformers with random codes."""
    name, config_name, options = CASES[case]
    models = f"transformers.models.{case}"
    config = getattr(import_module(f"{models}.configuration_{case}"), config_name)(**options)
    torch.manual_seed(0)
    quantizer = getattr(import_module(f"{models}.modeling_{case}"), name)(config)
    with torch.no_grad():
        for key, tensor in quantizer.state_dict().items():
            if tensor.dim() == 2:
                tensor.normal_()
            if "cluster" in key:
                tensor.fill_(2)
    return quantizer.eval()


def searches(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the rows [N, D] that a patched module searches, its codes and its indices [N]."""
    if hasattr(module, "embed"):
        return x, module.embed, module.quantize(x)
    if hasattr(module, "decode_latents"):
        indices = module.decode_latents(x.t()[None])[1]
        return F.normalize(x), F.normalize(module.codebook.weight), indices[0]
    codes, rows = module.embedding.weight, x
    if "Glm" in type(module).__name__:
        codes, rows = F.normalize(codes), F.normalize(x)
    if "Emu3" in type(module).__name__:
        return rows, codes, module(x.t().reshape(1, 1, x.shape[1], 4, -1)).flatten()
    return rows, codes, module(x.t().reshape(1, x.shape[1], 4, -1))[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_case
def test_every_index_is_the_nearest(case: str, dtype: torch.dtype) -> None:
    quantizer = make(case).to(dtype)
    names = list(quantizer.state_dict())
    found = patch(quantizer)
    assert list(quantizer.state_dict()) == names
    searching = [quantizer.get_submodule(name) for name in found]
    assert len(searching) == len(getattr(quantizer, "layers", getattr(quantizer, "quantizers", [1]))) or case == "mimi"
    for module in searching:
        num_channels = getattr(module, "embed", torch.zeros(1, DIM)).shape[-1]
        num_channels = getattr(module, "codebook_dim", num_channels)
        x = torch.randn(400, num_channels, generator=torch.Generator().manual_seed(1)).to(dtype)
        rows, codes, indices = searches(module, x)
        assert torch.equal(indices, brute_force_nearest(rows, codes.detach()))


@each_case
def test_results_equal_the_original_where_it_is_right(case: str) -> None:
    """In float64. DAC's original adds the squared norms of the codes with the wrong sign, which is no matter there."""
    original = make(case).double()
    patched = copy.deepcopy(original)
    patch(patched)
    x = torch.randn(2, DIM, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    call = {
        "encodec": lambda module, x: module.encode(x),
        "mimi": lambda module, x: module.encode(x),
        "xcodec": lambda module, x: module.encode(x.mT),
        "wavtokenizer": lambda module, x: module.encode(x.repeat(1, 32, 1).mT),
        "emu3": lambda module, x: module(x[:, None, :, :, None]),
    }.get(case, lambda module, x: module(x if case == "dac" else x[..., None]))
    results = []
    for module in (original, patched):
        leaf = x.clone().requires_grad_()
        found = call(module, leaf)
        found = found if isinstance(found, tuple) else (found,)
        if found[0].requires_grad:
            (found[0].square().sum() + sum(one.sum() for one in found[1:] if one.requires_grad)).backward()
            found = (*found, leaf.grad, *(parameter.grad for parameter in module.parameters()))
        results.append(found)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@each_case
def test_unpatching_pickling_and_loading(case: str) -> None:
    quantizer = make(case)
    kinds = [type(module) for module in quantizer.modules()]
    found = patch(quantizer)
    assert found == patch(quantizer)
    assert [type(module) for module in quantizer.modules()] != kinds
    buffer = io.BytesIO()
    torch.save(quantizer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert [type(one) for one in loaded.modules()] == [type(one) for one in quantizer.modules()]
    make(case).load_state_dict(quantizer.state_dict(), strict=True)
    assert unpatch(quantizer) == found
    assert [type(module) for module in quantizer.modules()] == kinds
    assert unpatch(quantizer) == {}
    assert {kind.__name__ for kind in kinds} >= set(found.values())


def test_a_whole_model_saves_and_loads(tmp_path: Path) -> None:
    from transformers import EncodecConfig, EncodecModel

    options = {"num_filters": 2, "num_residual_layers": 1, "num_lstm_layers": 1, "upsampling_ratios": [4, 4]}
    torch.manual_seed(0)
    model = EncodecModel(EncodecConfig(**AUDIO, **options)).eval()
    for layer in model.quantizer.layers:
        layer.codebook.embed.normal_()
    original = copy.deepcopy(model)
    found = patch(model)
    assert set(found.values()) == {"EncodecEuclideanCodebook"}
    assert "quantizer.layers.0.codebook" in found
    waves = torch.randn(1, 1, 640)
    codes = model.encode(waves).audio_codes
    assert torch.equal(codes, original.encode(waves).audio_codes)
    model.save_pretrained(tmp_path)
    again = EncodecModel.from_pretrained(tmp_path)
    assert torch.equal(again.encode(waves).audio_codes, codes)


def test_a_model_without_a_quantizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model must have a quantizer of Encodec.*, got Linear"):
        patch(nn.Linear(2, 2))
