"""Data sets for the nearest-code search, by name, seeded: the easy one and those on which other searches go wrong.

| name            | x and codebook                                           | what it is hard for                  |
|-----------------|----------------------------------------------------------|--------------------------------------|
| gaussian        | both standard normal                                     | nothing: the baseline                |
| clustered       | a code + 0.3 times a normal; the codes standard normal   | gaps as of a trained codebook        |
| offset-3        | gaussian, all of it moved by 3                           | 16-bit scores not shifted: a ReLU's  |
| offset-100      | gaussian moved by 100                                    | the expansion of ‖x - c‖² in float32 |
| offset-1000     | gaussian moved by 1000                                   | the same, by far                     |
| near-duplicates | clustered; codes in pairs that differ by one last bit    | every format short of float64        |
| uniform         | both uniform in ±1/K, a common initialisation            | fp16's range; a clamp before argmin  |
| duplicates      | clustered; half of the codes are copies of others        | the lowest index on a tie            |
| outliers        | near codes of lengths 0.01 to 10; copies and near copies | another code's bound, in a tie       |
| shell           | codes at a distance of 1 ± 1e-6 from nearly equal x      | a bound that leaves few candidates   |
| trained         | a vqae checkpoint's encoder outputs and codebook         | what training really makes           |
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor

_SAME_SIZE_INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}

_ENCODED_PICTURES = 4096


class SearchData(NamedTuple):
    """Vectors x [N, D] and codes codebook [K, D], of one dtype, on one device."""

    x: Tensor
    codebook: Tensor


def _gaussian(N: int, K: int, D: int, generator: Generator) -> SearchData:
    return SearchData(torch.randn(N, D, generator=generator), torch.randn(K, D, generator=generator))


def _clustered(N: int, K: int, D: int, generator: Generator) -> SearchData:
    codebook = torch.randn(K, D, generator=generator)
    centres = codebook[torch.randint(K, (N,), generator=generator)]
    return SearchData(torch.randn(N, D, generator=generator).mul_(0.3).add_(centres), codebook)


def _offset_by(offset: float) -> Callable[[int, int, int, Generator], SearchData]:
    def make(N: int, K: int, D: int, generator: Generator) -> SearchData:
        x, codebook = _gaussian(N, K, D, generator)
        return SearchData(x.add_(offset), codebook.add_(offset))

    return make


def _uniform(N: int, K: int, D: int, generator: Generator) -> SearchData:
    def draw(rows: int) -> Tensor:
        return torch.rand(rows, D, generator=generator).mul_(2).sub_(1).div_(K)

    return SearchData(draw(N), draw(K))


def _duplicates(N: int, K: int, D: int, generator: Generator) -> SearchData:
    x, codebook = _clustered(N, K, D, generator)
    order = torch.randperm(K, generator=generator)
    copies, originals = order[: K // 2], order[K - K // 2 :]
    codebook[copies] = codebook[originals]
    return SearchData(x, codebook)


def _outliers(N: int, K: int, D: int, generator: Generator) -> SearchData:
    lengths = 10 ** (3 * torch.rand(K, 1, generator=generator) - 2)
    codebook = torch.randn(K, D, generator=generator) * lengths
    order = torch.randperm(K, generator=generator)
    originals, copies, near_copies = order[: K // 3], order[K // 3 : 2 * (K // 3)], order[2 * (K // 3) : 3 * (K // 3)]
    codebook[copies] = codebook[originals]
    noise = torch.randn(near_copies.shape[0], D, generator=generator)
    codebook[near_copies] = codebook[originals] * (1 + 2e-7 * noise)
    centres = torch.randint(K, (N,), generator=generator)
    noise = torch.randn(N, D, generator=generator)
    return SearchData(codebook[centres] + 0.1 * lengths[centres] * noise, codebook)


def _shell(N: int, K: int, D: int, generator: Generator) -> SearchData:
    centre = torch.randn(D, generator=generator)
    directions = torch.nn.functional.normalize(torch.randn(K, D, generator=generator), dim=1)
    radii = 1 + 1e-6 * torch.randn(K, 1, generator=generator)
    return SearchData(centre + 1e-6 * torch.randn(N, D, generator=generator), centre + radii * directions)


_DRAWN: dict[str, Callable[[int, int, int, Generator], SearchData]] = {
    "gaussian": _gaussian,
    "clustered": _clustered,
    "offset-3": _offset_by(3.0),
    "offset-100": _offset_by(100.0),
    "offset-1000": _offset_by(1000.0),
    "near-duplicates": _clustered,  # the twins are made last, in the dtype asked for
    "uniform": _uniform,
    "duplicates": _duplicates,
    "outliers": _outliers,
    "shell": _shell,
}

DRAWN_DATA = tuple(_DRAWN)
"""The data sets that need a seed alone, in the order of the table above."""

DATA_NAMES = (*DRAWN_DATA, "trained")
"""Every data set; "trained" needs a checkpoint as well."""


def make_search_data(
    name: str,
    num_vectors: int,
    num_codes: int,
    code_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    checkpoint: Path | None = None,
) -> SearchData:
    """Draws data set `name`, the same values on every device.

    Args:
        name: one of `DATA_NAMES`.
        num_vectors: N.
        num_codes: K.
        code_dim: D.
        dtype: float64, float32, float16 or bfloat16; drawn in float32 and rounded to it.
        device: where the tensors go; they are drawn on the CPU.
        seed: of the generator.
        checkpoint: a checkpoint of `vqae.train`, for "trained" alone.

    Returns:
        SearchData(x [N, D], codebook [K, D]).

    Raises:
        ValueError: an unknown name, a dtype that is not listed, "trained" without a checkpoint or with
            one whose codebook is not [K, D].
    """
    if name not in DATA_NAMES:
        raise ValueError(f"name must be one of {', '.join(DATA_NAMES)}, got {name!r}")
    if dtype not in _SAME_SIZE_INTEGERS:
        raise ValueError(f"dtype must be float64, float32, float16 or bfloat16, got {dtype}")
    generator = torch.Generator().manual_seed(seed)
    if name == "trained":
        x, codebook = _load_trained(checkpoint, num_vectors, num_codes, code_dim, generator)
    else:
        x, codebook = _DRAWN[name](num_vectors, num_codes, code_dim, generator)
    x, codebook = x.to(dtype), codebook.to(dtype)
    if name == "near-duplicates":
        _make_twins(codebook, generator)
    return SearchData(x.to(device), codebook.to(device))


def _make_twins(codebook: Tensor, generator: Generator) -> None:
    """Makes code 2i + 1 equal to code 2i but for the last bit of one coordinate. In place."""
    pairs, code_dim = codebook.shape[0] // 2, codebook.shape[1]
    twins = codebook[0 : 2 * pairs : 2].clone()  # [K // 2, D]
    bits = twins.view(_SAME_SIZE_INTEGERS[codebook.dtype])
    bits[torch.arange(pairs), torch.randint(code_dim, (pairs,), generator=generator)] ^= 1
    codebook[1 : 2 * pairs : 2] = twins


def _load_trained(
    checkpoint: Path | None, num_vectors: int, num_codes: int, code_dim: int, generator: Generator
) -> SearchData:
    """What the encoder of a checkpoint makes of drawn pictures, and its codebook. Past 4,096 the rows repeat."""
    from vqae import VQAE  # needs torchvision, which the other data sets do not
    from vqae.data.synthetic import draw_images
    from vqae.runtime.errors import UsageError

    if checkpoint is None:
        raise ValueError("checkpoint must be given for the data set 'trained', got None")
    try:
        model = VQAE.load(checkpoint)
    except UsageError as error:
        raise ValueError(str(error)) from None
    codebook = model.quantizer.codebook.detach().clone()
    if tuple(codebook.shape) != (num_codes, code_dim):
        raise ValueError(f"checkpoint's codebook must be [{num_codes}, {code_dim}], got {tuple(codebook.shape)}")
    height, width = model.image_size
    num_pictures = min(num_vectors, _ENCODED_PICTURES)
    pictures = draw_images(num_pictures, "test", image_size=max(height, width), seed=generator.initial_seed())
    with torch.no_grad():
        batches = torch.split(model.normalise(pictures[:, :, :height, :width]), 256)
        embeddings = torch.cat([model.encoder(batch) for batch in batches])
    return SearchData(embeddings[torch.arange(num_vectors) % num_pictures], codebook)
