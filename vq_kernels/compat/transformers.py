"""Exact nearest-code search in the quantizers of models of transformers.

`patch(model)` gives each quantizer in it a subclass of its class that searches by `nearest_code`. Parameters, buffers
and names stay as they are. transformers is not imported.
"""

import sys
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vq_kernels.search import nearest_code

_PREFIX = "Exact"


class _Codebook(nn.Module):
    """A codebook `embed` [K, D] that finds the indices of rows."""

    embed: Tensor

    def quantize(self, hidden_states: Tensor) -> Tensor:
        """Returns the indices [N] of the codes nearest to rows [N, D]."""
        return nearest_code(hidden_states, self.embed).indices


class _NormalisedCodes(nn.Module):
    """A quantizer that compares normalised rows and codes, and returns codes as they are."""

    codebook: nn.Embedding

    def decode_latents(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the codes [b, D, n] of [b, D, n] and their indices [b, n]."""
        places = torch.arange(self.codebook.num_embeddings, device=hidden_states.device)
        codes = self.codebook(places)  # by a call, which fetches weights that accelerate offloads
        indices = nearest_code(F.normalize(hidden_states.transpose(1, 2), dim=-1), F.normalize(codes)).indices
        return self.codebook(indices).transpose(1, 2), indices


class _ImageIndices(nn.Module):
    """A quantizer that returns the indices of video frames."""

    embedding: nn.Embedding

    def forward(self, hidden_state: Tensor) -> Tensor:
        """Returns the indices [b, t, h, w] of [b, t, D, h, w]."""
        return nearest_code(hidden_state.movedim(2, -1), self.embedding.weight).indices


class _ImageCodes(nn.Module):
    """A quantizer of images."""

    embedding: nn.Embedding
    beta: float
    normalises = False

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the codes [b, D, h, w] of [b, D, h, w], the loss [], and the indices [b·h·w]."""
        rows, codebook = hidden_state.movedim(1, -1), self.embedding.weight
        if self.normalises:
            rows, codebook = F.normalize(rows, dim=-1), F.normalize(codebook, dim=-1)
        indices = nearest_code(rows, codebook).indices
        codes = F.embedding(indices, codebook)
        loss = F.mse_loss(rows, codes.detach()) + self.beta * F.mse_loss(codes, rows.detach())
        quantized = rows + (codes - rows).detach()  # the gradient passes straight through
        return quantized.movedim(-1, 1).contiguous(), loss, indices.flatten()


class _NormalisedImageCodes(_ImageCodes):
    normalises = True


_SEARCHES: dict[str, tuple[str, type[nn.Module]]] = {
    "EncodecEuclideanCodebook": ("encodec", _Codebook),
    "MimiEuclideanCodebook": ("mimi", _Codebook),
    "XcodecEuclideanCodebook": ("xcodec", _Codebook),
    "WavTokenizerEuclideanCodebook": ("wavtokenizer", _Codebook),
    "DacVectorQuantize": ("dac", _NormalisedCodes),
    "ChameleonVQVAEVectorQuantizer": ("chameleon", _ImageCodes),
    "JanusVQVAEVectorQuantizer": ("janus", _ImageCodes),
    "GlmImageVQVAEVectorQuantizer": ("glm_image", _NormalisedImageCodes),
    "Emu3VQVAEVectorQuantizer": ("emu3", _ImageIndices),
}
"""The classes of transformers whose search is replaced: the model that defines each, and what replaces it."""


def patch(model: nn.Module) -> dict[str, str]:
    """Makes the quantizers of a model of transformers search exactly, in place.

    Known are those of EnCodec, Mimi (and so Moshi and CSM), DAC, X-Codec, WavTokenizer, Chameleon,
    Janus, GLM-Image and Emu3. Each module keeps its parameters, buffers and names, so checkpoints load and save as
    before. DAC compares normalised codes; the original adds their squared norms with the wrong sign, so that it may
    choose another code than the nearest of them.

    Args:
        model: a model, or a part of it.

    Returns:
        The name of each quantizer that now searches exactly, and its class in transformers.

    Raises:
        ValueError: the model has no known quantizer.
    """
    found = {}
    for name, module in model.named_modules():
        kind = type(module).__name__.removeprefix(_PREFIX)
        if type(module) is _known_class(kind):
            module.__class__ = _exact_class(kind)
        if _is_exact(module):
            found[name] = kind
    if not found:
        raise ValueError(f"model must have a quantizer of {', '.join(_SEARCHES)}, got {type(model).__name__}")
    return found


def unpatch(model: nn.Module) -> dict[str, str]:
    """Undoes `patch`, in place. Returns the name of each quantizer that it changed back, and its class."""
    found = {}
    for name, module in model.named_modules():
        if _is_exact(module):
            found[name] = type(module).__name__.removeprefix(_PREFIX)
            module.__class__ = type(module).__bases__[1]
    return found


def _is_exact(module: nn.Module) -> bool:
    return type(module).__module__ == __name__


def _known_class(kind: str) -> type[nn.Module] | None:
    """Returns a class of transformers, if it is imported."""
    path = f"transformers.models.{_SEARCHES[kind][0]}.modeling_{_SEARCHES[kind][0]}" if kind in _SEARCHES else ""
    return getattr(sys.modules.get(path), kind, None)


def _exact_class(kind: str) -> Any:
    """Returns the subclass of a class of transformers, always the same one, so that it can be pickled by its name."""
    name = _PREFIX + kind
    if name not in globals():
        model, search = _SEARCHES[kind]
        original = getattr(import_module(f"transformers.models.{model}.modeling_{model}"), kind)
        globals()[name] = type(name, (search, original), {"__module__": __name__, "__doc__": search.__doc__})
    return globals()[name]


def __getattr__(name: str) -> Any:
    """Makes the classes on demand, for a model that is unpickled."""
    if name.removeprefix(_PREFIX) in _SEARCHES:
        return _exact_class(name.removeprefix(_PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
