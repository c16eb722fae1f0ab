"""Which tiles the Triton scan uses, and how a search is cut into launches. Pure functions: no device is asked.

The model behind the choice, in clocks of one multiprocessor for a tile of BLOCK_N x BLOCK_K scores: the matrix units
of an H100 need BLOCK_N * BLOCK_K * D / 2048 in 16 bits, the epilogue 4 ALU instructions a score at 64 lanes a clock.
Both are equal at D = 128; below it the epilogue decides, above it the matrix units and the way from L2.
"""

from dataclasses import dataclass

import torch

from vq_kernels.search.triton.common import ceil_div
from vq_kernels.search.triton.prepare import prepared_nbytes, row_pitch

# Tiles that one program folds: 7 bits of tile and 1 of parity cost 2**-15 relative, beside 2**-12 of fp16's rounding.
MAX_TILES_PER_SPLIT = 128
# Bytes of a row in each buffer: 4 candidates and its number on the one list, its number on the other.
_LIST_NBYTES = (16, 4, 4)
# Of a row's state in each split: the best 4 scores and the best one not among them, 4 codes.
_STATE_NBYTES = (20, 16)
# Of a row's ratio and its margin, kept where they are not made by the program that uses them.
_MARGIN_NBYTES = (4, 4)
_WORKSPACE_CEILING = 256 * 2**20
_SMALL_NBYTES = 2**13  # for what does not grow with a search: bounds, exponent, counters, the rounding of each
# PyTorch's allocator counts as a buffer's own what is left of the block that it lies in, up to so much; buffers no
# larger than this have blocks of their size.
_UNSPLIT_NBYTES = 2**20


@dataclass(frozen=True)
class DeviceProperties:
    """What the choice depends on: compute capability (major, minor) and the number of multiprocessors."""

    capability: tuple[int, int]
    multiprocessors: int


@dataclass(frozen=True)
class ScanConfig:
    """One shape of the scan.

    Attributes:
        resident: x' is made by the program and stays on the chip; else it is made by a launch before, and both x' and
            the codes are read in pieces of block_d columns.
        block_d: columns a product takes at once; for a resident configuration the most that it is made for.
        max_registers: what a thread may use, where that decides how many programs share a multiprocessor.
    """

    name: str
    block_n: int
    block_k: int
    block_d: int
    resident: bool
    num_warps: int
    num_stages: int
    max_registers: int | None
    reason: str

    def columns(self, d: int) -> int:
        """Columns of one product for codes of D = d."""
        return min(self.block_d, max(16, 1 << (d - 1).bit_length()))


@dataclass(frozen=True)
class SearchPlan:
    """How one search is launched.

    Attributes:
        splits: parts of the codebook, each scanned by programs of its own.
        tiles_per_split: tiles of config.block_k codes in each part but the last.
        rows_per_launch: rows of x that one round of launches takes; bounds the workspace.
    """

    config: ScanConfig
    splits: int
    tiles_per_split: int
    rows_per_launch: int

    @property
    def tile_mask(self) -> int:
        """The low bits of a score that hold its place: the tile in its split, and above it the column's parity."""
        return 2 * (1 << (self.tiles_per_split - 1).bit_length()) - 1


CONFIGS = (
    ScanConfig(
        "short", 128, 64, 128, True, 8, 3, None,
        "x' stays in registers; 64 columns leave it room where a tile of 128 or a cap on registers would spill",
    ),
    ScanConfig(
        "short_shared", 128, 64, 64, True, 8, 3, 128,
        "128 registers let two programs share a multiprocessor: one's epilogue hides the other's products",
    ),
    ScanConfig(
        "medium", 128, 128, 128, True, 8, 2, None,
        "products and epilogue take equal time; wide tiles halve the codes' traffic from L2",
    ),
    ScanConfig(
        "long_ampere", 128, 128, 32, False, 8, 3, None,
        "a loop over D; pieces of 32 columns keep the register operands of mma.sync small",
    ),
    ScanConfig(
        "long_hopper", 128, 128, 64, False, 8, 3, None,
        "a loop over D; 128 bytes of a row a piece, one swizzled line of shared memory",
    ),
    ScanConfig(
        "few_rows", 64, 64, 64, False, 4, 4, None,
        "too few rows to fill the device: small tiles and a split codebook make more programs",
    ),
)  # fmt: skip
_BY_NAME = {config.name: config for config in CONFIGS}


def pick_config(
    n: int, k: int, d: int, dtype: torch.dtype, properties: DeviceProperties, *, aligned: bool = True
) -> ScanConfig:
    """The configuration for a search of [n, d] rows among k codes.

    Args:
        n: rows. k: codes. d: their length.
        dtype: x's; every choice so far serves all three dtypes, since the products are float16 whatever x is.
        properties: of the device.
        aligned: x's rows are contiguous and a multiple of 16 entries apart, so that they are read without a mask.

    Returns:
        One of CONFIGS.
    """
    major = properties.capability[0]
    tiles = ceil_div(n, 128) * ceil_div(k, 128)
    if d > 64 and tiles < properties.multiprocessors:
        return _BY_NAME["few_rows"]
    aligned = aligned and d % 16 == 0
    # On Ampere, unaligned rows of more than 32 columns do not leave x' room in registers.
    if d > 128 or (major == 8 and d > 32 and not aligned):
        return _BY_NAME["long_ampere" if major == 8 else "long_hopper"]
    # Unaligned rows take the registers of a second program anyway, so the tile may be wide.
    if major >= 9 and (d > 64 or not aligned):
        return _BY_NAME["medium"]
    # Only Hopper's x' and epilogue fit 128 registers.
    return _BY_NAME["short_shared" if major == 9 else "short"]


def workspace_limit(n: int, k: int, d: int) -> int:
    """Bytes a search may take beyond inputs and outputs: 1 % of [n, k] in float32, or 16 MiB and the codebook again."""
    return max(n * k * 4 // 100, 16 * 2**20 + 4 * k * d)


def plan_search(n: int, k: int, d: int, config: ScanConfig, properties: DeviceProperties) -> SearchPlan:
    """Splits that fill the device and keep the packed bits few, and rows a launch that keep within the memory limit."""
    available = workspace_limit(n, k, d) - prepared_nbytes(k, d) - 4 * d - _SMALL_NBYTES
    available = min(available, _WORKSPACE_CEILING)
    of_row: tuple[int, ...] = _LIST_NBYTES if config.resident else (*_LIST_NBYTES, *_MARGIN_NBYTES, 2 * row_pitch(d))
    tiles = ceil_div(k, config.block_k)
    programs = ceil_div(min(n, available // sum(of_row)), config.block_n)
    wanted = max(ceil_div(tiles, MAX_TILES_PER_SPLIT), properties.multiprocessors // max(programs, 1))
    tiles_per_split = ceil_div(tiles, min(wanted, tiles)) if wanted > 1 else tiles
    splits = ceil_div(tiles, tiles_per_split)
    if splits > 1:
        of_row += tuple(splits * nbytes for nbytes in _STATE_NBYTES) + (_MARGIN_NBYTES[:1] if config.resident else ())
    rows = min(n, available // sum(of_row))
    buffers = (2 * k * row_pitch(d), 4 * k, *(nbytes * rows for nbytes in of_row))
    large = sum(nbytes > _UNSPLIT_NBYTES for nbytes in buffers)
    rows_per_launch = (available - large * _UNSPLIT_NBYTES) // sum(of_row) // config.block_n * config.block_n
    return SearchPlan(config, splits, tiles_per_split, max(rows_per_launch, config.block_n))
