"""The rows of the exactness stage, made on the device, since 10^9 rows are too many to draw on a CPU."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pixel_kmeans import lloyd
from torch import Generator, Tensor
from torch.nn import functional as F

from vqae import VQAE

Pair = tuple[Tensor, Tensor]
"""Rows x [n, D] and codes [K, D]."""

Kind = Literal["gaussian", "clustered", "offset", "near-duplicates", "duplicates", "patches", "embeddings"]

BLOCK_ROWS = 1 << 20
"""Rows at a time, at most; each block of drawn rows has a codebook of its own."""

_KMEANS_ROWS = 1 << 17
_KMEANS_ROUNDS = 5
_MOVED_BY = 4  # pixels, at most
_MODEL_BATCH = 4096


@dataclass(frozen=True)
class Part:
    """A part of the rows.

    Attributes:
        name: in the results.
        kind: how rows and codes are made. Patches: of the pictures, at every place, mirrored too; their codes are
            K-means' of some of them. Embeddings: of the pictures, moved and mirrored; their codes are the model's.
        num_codes: K.
        code_dim: D; for patches 3 times a square, for embeddings the model's.
        dtype: of the rows and of the codes.
        rows: how many there are to be.
        offset: added to both sides.
        pad_columns: the rows lie so many numbers further apart than D, so that they are not aligned.
    """

    name: str
    kind: Kind
    num_codes: int
    code_dim: int
    dtype: torch.dtype
    rows: int
    offset: float = 0.0
    pad_columns: int = 0

    @property
    def patch_side(self) -> int:
        """Of a patch of three colours with code_dim numbers, in pixels."""
        return math.isqrt(self.code_dim // 3)


_MILLION = 10**6

PARTS = (
    Part("gaussian", "gaussian", 1024, 64, torch.float32, 300 * _MILLION),
    Part("clustered", "clustered", 1024, 64, torch.float32, 150 * _MILLION),
    Part("offset by 1000", "offset", 1024, 64, torch.float32, 100 * _MILLION, offset=1000.0),
    Part("duplicates", "duplicates", 512, 16, torch.float32, 100 * _MILLION),
    Part("patches 4 x 4", "patches", 1024, 48, torch.float32, 90 * _MILLION),
    Part("gaussian, D = 512", "gaussian", 512, 512, torch.float32, 30 * _MILLION),
    Part("patches 8 x 8", "patches", 1024, 192, torch.float32, 30 * _MILLION),
    Part("near-duplicates", "near-duplicates", 512, 16, torch.float32, 50 * _MILLION),
    Part("gaussian, 4,096 codes", "gaussian", 4096, 32, torch.float32, 60 * _MILLION),
    Part("gaussian, D = 100, unaligned", "gaussian", 1000, 100, torch.float32, 60 * _MILLION, pad_columns=1),
    Part("offset by 3, float16", "offset", 1024, 128, torch.float16, 60 * _MILLION, offset=3.0),
    Part("clustered, bfloat16, D = 256", "clustered", 2048, 256, torch.bfloat16, 30 * _MILLION),
    Part("gaussian, D = 8", "gaussian", 1024, 8, torch.float32, 60 * _MILLION),
    Part("trained embeddings", "embeddings", 512, 512, torch.float32, 5 * _MILLION),
)
"""10^9 rows even where there are no pictures."""


def rehearsed(part: Part) -> Part:
    """The same in small, for the interpreter."""
    return replace(part, num_codes=40, code_dim=min(part.code_dim, 48), rows=24)


def drawn_blocks(part: Part, rows: int, seed: int, device: torch.device) -> Iterator[Pair]:
    """Blocks of `rows` rows in all of a part that is drawn, each with its codes, by a seed."""
    make = _MAKERS[part.kind]
    generator = torch.Generator(device).manual_seed(seed)
    for start in range(0, rows, BLOCK_ROWS):
        size = min(BLOCK_ROWS, rows - start)
        x, codebook = make(size, part.num_codes, part.code_dim, generator)
        x, codebook = (x + part.offset).to(part.dtype), (codebook + part.offset).to(part.dtype)
        if part.kind == "near-duplicates":
            _make_twins(codebook, generator)
        yield _spread(x, part.pad_columns), codebook


def _randn(rows: int, columns: int, generator: Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, device=generator.device)


def _gaussian(rows: int, num_codes: int, code_dim: int, generator: Generator) -> Pair:
    return _randn(rows, code_dim, generator), _randn(num_codes, code_dim, generator)


def _clustered(rows: int, num_codes: int, code_dim: int, generator: Generator) -> Pair:
    codebook = _randn(num_codes, code_dim, generator)
    chosen = torch.randint(num_codes, (rows,), generator=generator, device=generator.device)
    return _randn(rows, code_dim, generator).mul_(0.3).add_(codebook[chosen]), codebook


def _duplicates(rows: int, num_codes: int, code_dim: int, generator: Generator) -> Pair:
    """Half of the codes are copies of the others, in any order."""
    x, codebook = _clustered(rows, num_codes, code_dim, generator)
    order = torch.randperm(num_codes, generator=generator, device=generator.device)
    codebook[order[: num_codes // 2]] = codebook[order[num_codes - num_codes // 2 :]]
    return x, codebook


_MAKERS: dict[Kind, Callable[[int, int, int, Generator], Pair]] = {
    "gaussian": _gaussian,
    "clustered": _clustered,
    "offset": _gaussian,
    "near-duplicates": _clustered,
    "duplicates": _duplicates,
}


def _make_twins(codebook: Tensor, generator: Generator) -> None:
    """Make code 2i + 1 equal to code 2i [K, D] float32 but for the last bit of one number, in place."""
    pairs = codebook.shape[0] // 2
    twins = codebook[0 : 2 * pairs : 2].clone()
    column = torch.randint(codebook.shape[1], (pairs,), generator=generator, device=generator.device)
    twins.view(torch.int32)[torch.arange(pairs, device=column.device), column] ^= 1
    codebook[1 : 2 * pairs : 2] = twins


def _spread(x: Tensor, pad_columns: int) -> Tensor:
    """x [n, D] as a view of [n, D + pad_columns]."""
    if not pad_columns:
        return x
    wider = x.new_zeros(x.shape[0], x.shape[1] + pad_columns)
    wider[:, : x.shape[1]] = x
    return wider[:, : x.shape[1]]


def num_patches(pictures: Tensor, side: int) -> int:
    """How many patches pictures [M, 3, H, W] have, those of the mirrored pictures counted."""
    return 2 * pictures.shape[0] * (pictures.shape[2] - side + 1) * (pictures.shape[3] - side + 1)


def patches(pictures: Tensor, side: int) -> Tensor:
    """Every patch of pictures [M, 3, H, W] uint8: [M * places, 3 * side * side] float32 in [0, 1]."""
    columns = F.unfold(pictures.float() / 255, side)  # [M, 3 * side * side, places]
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def patch_blocks(part: Part, rows: slice, seed: int, pictures: Tensor) -> Iterator[Pair]:
    """The patches number rows.start to rows.stop of pictures [M, 3, H, W] on the device, in blocks, with one codebook.

    Patches are numbered by picture, those of the mirrored pictures last.
    """
    side = part.patch_side
    both = torch.arange(2 * pictures.shape[0], device=pictures.device)
    places = num_patches(pictures, side) // both.shape[0]
    generator = torch.Generator(pictures.device).manual_seed(seed)
    codebook = _patch_codes(part, generator, pictures)
    group = max(1, BLOCK_ROWS // places)  # pictures at a time
    first, last = rows.start // places, -(-rows.stop // places)
    for start in range(first, last, group):
        numbers = both[start : min(start + group, last)]
        chosen = pictures[numbers % pictures.shape[0]]
        mirrored = (numbers >= pictures.shape[0])[:, None, None, None]
        x = patches(torch.where(mirrored, chosen.flip(3), chosen), side)
        begin, end = max(rows.start - start * places, 0), min(rows.stop - start * places, x.shape[0])
        yield x[begin:end], codebook


def _patch_codes(part: Part, generator: Generator, pictures: Tensor) -> Tensor:
    """Codes [K, D]: K-means of patches of pictures picked at random."""
    side = part.patch_side
    places = num_patches(pictures, side) // (2 * pictures.shape[0])
    count = min(pictures.shape[0], max(2, _KMEANS_ROWS // places, -(-4 * part.num_codes // places)))
    picked = torch.randperm(pictures.shape[0], generator=generator, device=pictures.device)[:count]
    x = patches(pictures[picked], side)
    start = x[torch.randperm(x.shape[0], generator=generator, device=x.device)[: part.num_codes]]
    # An equal start is no code of its own; a little noise parts them.
    noise = torch.randn(start.shape, generator=generator, device=start.device)
    return lloyd(x, start + 1e-3 * noise, _KMEANS_ROUNDS)[0]


@torch.no_grad()
def embedding_blocks(model: VQAE, pictures: Tensor, turn: int, rows: int) -> Iterator[Pair]:
    """At least `rows` embeddings of pictures [M, 3, H, W] in the model's codebook, a block for each view of them all.

    A view moves all pictures by the same few pixels, and mirrors them or not; no two blocks of all turns are alike.
    """
    codebook = model.quantizer.codebook.detach()
    steps = range(-_MOVED_BY, _MOVED_BY + 1)
    views = [(down, right, mirror) for down in steps for right in steps for mirror in (False, True)]
    order = torch.randperm(len(views), generator=torch.Generator().manual_seed(0)).tolist()
    count = -(-rows // pictures.shape[0])
    for number in order[turn * count : (turn + 1) * count]:
        down, right, mirror = views[number]
        moved = pictures.roll((down, right), dims=(2, 3))
        parts = torch.split(moved.flip(3) if mirror else moved, _MODEL_BATCH)
        yield torch.cat([model.encoder(model.normalise(part)).float() for part in parts]), codebook
