"""Data sets for the nearest-code search, by name and seed: an easy one, and some on which other searches fail.

| name            | x and codebook                                           | hard for                              |
|-----------------|----------------------------------------------------------|---------------------------------------|
| gaussian        | both standard normal                                     | nothing: the baseline                 |
| clustered       | standard normal codes; x is a code + 0.3 times a normal  | nothing: like a trained codebook      |
| offset-3        | gaussian + 3, as after a ReLU                            | 16-bit scores without a shift         |
| offset-100      | gaussian + 100                                           | the expansion of ‖x - c‖² in float32  |
| offset-1000     | gaussian + 1000                                          | the same, more so                     |
| near-duplicates | clustered; pairs of codes differ in one last bit         | every format below float64            |
| uniform         | both uniform in ±1/K, a common initialisation            | float16's range; a clamp before argmin |
| duplicates      | clustered; half of the codes are copies of others        | the lowest index on a tie             |
| outliers        | near codes of lengths 0.01 to 10; copies and near copies | one error bound for all codes         |
| shell           | nearly equal x; codes at a distance of 1 ± 1e-6          | a bound that leaves few candidates    |
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

_SAME_SIZE_INTEGERS = {
    **{torch.float64: torch.int64, torch.float32: torch.int32},
    **{torch.float16: torch.int16, torch.bfloat16: torch.int16},
}


class SearchData(NamedTuple):
    """Vectors x [N, D] and codes codebook [K, D], of one dtype, on one device."""

    x: Tensor
    codebook: Tensor


def _randn(rows: int, columns: int, generator: Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, device=generator.device)


def _rand(rows: int, columns: int, generator: Generator) -> Tensor:
    return torch.rand(rows, columns, generator=generator, device=generator.device)


def _randint(high: int, count: int, generator: Generator) -> Tensor:
    return torch.randint(high, (count,), generator=generator, device=generator.device)


def _gaussian(N: int, K: int, D: int, generator: Generator) -> SearchData:
    return SearchData(_randn(N, D, generator), _randn(K, D, generator))


def _clustered(N: int, K: int, D: int, generator: Generator) -> SearchData:
    codebook = _randn(K, D, generator)
    centres = codebook[_randint(K, N, generator)]
    return SearchData(_randn(N, D, generator).mul_(0.3).add_(centres), codebook)


def _offset_by(offset: float) -> Callable[[int, int, int, Generator], SearchData]:
    def make(N: int, K: int, D: int, generator: Generator) -> SearchData:
        x, codebook = _gaussian(N, K, D, generator)
        return SearchData(x.add_(offset), codebook.add_(offset))

    return make


def _uniform(N: int, K: int, D: int, generator: Generator) -> SearchData:
    x, codebook = (_rand(rows, D, generator).mul_(2).sub_(1).div_(K) for rows in (N, K))
    return SearchData(x, codebook)


def _duplicates(N: int, K: int, D: int, generator: Generator) -> SearchData:
    x, codebook = _clustered(N, K, D, generator)
    order = torch.randperm(K, generator=generator, device=generator.device)
    copies, originals = order[: K // 2], order[K - K // 2 :]
    codebook[copies] = codebook[originals]
    return SearchData(x, codebook)


def _outliers(N: int, K: int, D: int, generator: Generator) -> SearchData:
    lengths = 10 ** (3 * _rand(K, 1, generator) - 2)
    codebook = _randn(K, D, generator) * lengths
    order = torch.randperm(K, generator=generator, device=generator.device)
    originals, copies, near_copies = order[: K // 3], order[K // 3 : 2 * (K // 3)], order[2 * (K // 3) : 3 * (K // 3)]
    codebook[copies] = codebook[originals]
    codebook[near_copies] = codebook[originals] * (1 + 2e-7 * _randn(near_copies.shape[0], D, generator))
    centres = _randint(K, N, generator)
    return SearchData(codebook[centres] + 0.1 * lengths[centres] * _randn(N, D, generator), codebook)


def _shell(N: int, K: int, D: int, generator: Generator) -> SearchData:
    centre = _randn(1, D, generator)
    directions = torch.nn.functional.normalize(_randn(K, D, generator), dim=1)
    radii = 1 + 1e-6 * _randn(K, 1, generator)
    return SearchData(centre + 1e-6 * _randn(N, D, generator), centre + radii * directions)


_DRAWN: dict[str, Callable[[int, int, int, Generator], SearchData]] = {
    "gaussian": _gaussian,
    "clustered": _clustered,
    "offset-3": _offset_by(3.0),
    "offset-100": _offset_by(100.0),
    "offset-1000": _offset_by(1000.0),
    "near-duplicates": _clustered,  # make_search_data adds the twins, in the dtype that is asked for
    "uniform": _uniform,
    "duplicates": _duplicates,
    "outliers": _outliers,
    "shell": _shell,
}

DATA_NAMES = tuple(_DRAWN)
"""All data sets, in the order of the table above."""


def make_search_data(
    name: str,
    num_vectors: int,
    num_codes: int,
    code_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    draw_on_device: bool = False,
) -> SearchData:
    """Draws a data set: SearchData(x [N, D], codebook [K, D]).

    Args:
        name: one of `DATA_NAMES`.
        num_vectors, num_codes, code_dim: N, K, D.
        dtype: float64, float32, float16 or bfloat16. Values are drawn in float32 and rounded to it.
        device: the device of the result.
        seed: seed of the generator.
        draw_on_device: draw on `device`. By default the CPU draws, so that every device gets the same values.

    Raises:
        ValueError: an unknown name or dtype.
    """
    if name not in DATA_NAMES:
        raise ValueError(f"name must be one of {', '.join(DATA_NAMES)}, got {name!r}")
    if dtype not in _SAME_SIZE_INTEGERS:
        raise ValueError(f"dtype must be float64, float32, float16 or bfloat16, got {dtype}")
    generator = torch.Generator(device if draw_on_device else "cpu").manual_seed(seed)
    x, codebook = (tensor.to(dtype) for tensor in _DRAWN[name](num_vectors, num_codes, code_dim, generator))
    if name == "near-duplicates":
        _make_twins(codebook, generator)
    return SearchData(x.to(device), codebook.to(device))


def _make_twins(codebook: Tensor, generator: Generator) -> None:
    """Sets code 2i + 1 to code 2i with the last bit of one coordinate flipped. In place."""
    pairs, code_dim = codebook.shape[0] // 2, codebook.shape[1]
    twins = codebook[0 : 2 * pairs : 2].clone()  # [K // 2, D]
    bits = twins.view(_SAME_SIZE_INTEGERS[codebook.dtype])
    bits[torch.arange(pairs, device=bits.device), _randint(code_dim, pairs, generator)] ^= 1
    codebook[1 : 2 * pairs : 2] = twins
