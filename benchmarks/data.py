"""Data sets for the nearest-code search, by name and seed. On most of them, less exact searches return wrong indices.

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
from typing import Any, NamedTuple

import torch
from torch import Tensor

_F16, _BF16 = torch.float16, torch.bfloat16
_SAME_SIZE_INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, _F16: torch.int16, _BF16: torch.int16}


class SearchData(NamedTuple):
    """Vectors x [N, D] and codes codebook [K, D], of one dtype, on one device."""

    x: Tensor
    codebook: Tensor


Draw = dict[str, Any]  # generator and device, for torch's functions that draw


def _gaussian(N: int, K: int, D: int, draw: Draw) -> SearchData:
    return SearchData(torch.randn(N, D, **draw), torch.randn(K, D, **draw))


def _clustered(N: int, K: int, D: int, draw: Draw) -> SearchData:
    codebook = torch.randn(K, D, **draw)
    centres = codebook[torch.randint(K, (N,), **draw)]
    return SearchData(torch.randn(N, D, **draw).mul_(0.3).add_(centres), codebook)


def _offset_by(offset: float) -> Callable[[int, int, int, Draw], SearchData]:
    def make(N: int, K: int, D: int, draw: Draw) -> SearchData:
        x, codebook = _gaussian(N, K, D, draw)
        return SearchData(x.add_(offset), codebook.add_(offset))

    return make


def _uniform(N: int, K: int, D: int, draw: Draw) -> SearchData:
    x, codebook = (torch.rand(rows, D, **draw).mul_(2).sub_(1).div_(K) for rows in (N, K))
    return SearchData(x, codebook)


def _duplicates(N: int, K: int, D: int, draw: Draw) -> SearchData:
    x, codebook = _clustered(N, K, D, draw)
    order = torch.randperm(K, **draw)
    copies, originals = order[: K // 2], order[K - K // 2 :]
    codebook[copies] = codebook[originals]
    return SearchData(x, codebook)


def _outliers(N: int, K: int, D: int, draw: Draw) -> SearchData:
    lengths = 10 ** (3 * torch.rand(K, 1, **draw) - 2)
    codebook = torch.randn(K, D, **draw) * lengths
    order = torch.randperm(K, **draw)
    originals, copies, near_copies = order[: K // 3], order[K // 3 : 2 * (K // 3)], order[2 * (K // 3) : 3 * (K // 3)]
    codebook[copies] = codebook[originals]
    codebook[near_copies] = codebook[originals] * (1 + 2e-7 * torch.randn(near_copies.shape[0], D, **draw))
    centres = torch.randint(K, (N,), **draw)
    return SearchData(codebook[centres] + 0.1 * lengths[centres] * torch.randn(N, D, **draw), codebook)


def _shell(N: int, K: int, D: int, draw: Draw) -> SearchData:
    centre = torch.randn(1, D, **draw)
    directions = torch.nn.functional.normalize(torch.randn(K, D, **draw), dim=1)
    radii = 1 + 1e-6 * torch.randn(K, 1, **draw)
    return SearchData(centre + 1e-6 * torch.randn(N, D, **draw), centre + radii * directions)


_DRAWN: dict[str, Callable[[int, int, int, Draw], SearchData]] = {
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
    """Draws data set `name`: SearchData(x [N, D], codebook [K, D]). Raises ValueError for an unknown name or dtype.

    Values are drawn in float32 and rounded to `dtype`: float64, float32, float16 or bfloat16. By default the CPU draws,
    so that every device gets the same values.
    """
    if name not in DATA_NAMES:
        raise ValueError(f"name must be one of {', '.join(DATA_NAMES)}, got {name!r}")
    if dtype not in _SAME_SIZE_INTEGERS:
        raise ValueError(f"dtype must be float64, float32, float16 or bfloat16, got {dtype}")
    generator = torch.Generator(device if draw_on_device else "cpu").manual_seed(seed)
    draw: Draw = {"generator": generator, "device": generator.device}
    x, codebook = (tensor.to(dtype) for tensor in _DRAWN[name](num_vectors, num_codes, code_dim, draw))
    if name == "near-duplicates":
        _make_twins(codebook, draw)
    return SearchData(x.to(device), codebook.to(device))


def _make_twins(codebook: Tensor, draw: Draw) -> None:
    """Sets code 2i + 1 to code 2i with the last bit of one coordinate flipped. In place."""
    pairs, code_dim = codebook.shape[0] // 2, codebook.shape[1]
    twins = codebook[0 : 2 * pairs : 2].clone()  # [K // 2, D]
    bits = twins.view(_SAME_SIZE_INTEGERS[codebook.dtype])
    bits[torch.arange(pairs, device=bits.device), torch.randint(code_dim, (pairs,), **draw)] ^= 1
    codebook[1 : 2 * pairs : 2] = twins
