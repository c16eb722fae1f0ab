"""Selects the tiles of the Triton scan and divides a search into launches. Pure functions that need no device.

The model behind the choice, in clocks of one multiprocessor per tile of BLOCK_N x BLOCK_K scores: the matrix units of
an H100 need BLOCK_N * BLOCK_K * D / 2048 in 16 bits; the epilogue needs 4 ALU instructions per score, at 64 lanes per
clock. Both are equal at D = 128. Below it the epilogue dominates, above it the matrix units and the reads from L2.
"""

from dataclasses import dataclass

import torch

from vq_kernels.search.triton.common import ceil_div

# Half norms and codes are padded to a multiple of the widest tile, so that the scan needs no mask over codes.
CODE_PADDING = 128
# Codes that one program scans: 7 bits of tile and 1 of parity cost 2**-15 relative, small against fp16's 2**-12.
MAX_CODES_PER_SPLIT = 128 * 64


@dataclass(frozen=True)
class DeviceProperties:
    """Compute capability (major, minor) and the number of multiprocessors."""

    capability: tuple[int, int]
    multiprocessors: int


@dataclass(frozen=True)
class ScanConfig:
    """One configuration of the scan.

    Attributes:
        resident: the program computes x' in registers. Otherwise it stores x' first, in the memory of the codes.
        block_d: columns per product. If D is at most block_d, x' stays in shared memory. Otherwise the scan reads x'
            and the codes in pieces of block_d columns. The largest D of a resident configuration.
        max_registers: registers per thread, if they limit how many programs share a multiprocessor.
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
        """Columns per product for D = d."""
        return min(self.block_d, max(16, 1 << (d - 1).bit_length()))


@dataclass(frozen=True)
class SearchPlan:
    """How one search is launched.

    Attributes:
        splits: parts of the codebook, each scanned by its own programs.
        tiles_per_split: tiles of config.block_k codes in each part but the last.
    """

    config: ScanConfig
    splits: int
    tiles_per_split: int

    @property
    def tile_mask(self) -> int:
        """The low bits of a score that hold its position: 64 codes of its split, and above it the column's parity."""
        return 2 * (1 << (self.tiles_per_split * self.config.block_k // 64 - 1).bit_length()) - 1


CONFIGS = (
    ScanConfig(
        "short", 128, 64, 128, True, 8, 3, None,
        "a tile of 128 codes, or a limit on registers, would spill",
    ),
    ScanConfig(
        "short_shared", 128, 64, 64, True, 8, 3, 128,
        "128 registers let two programs share a multiprocessor, so epilogue and products overlap",
    ),
    ScanConfig(
        "medium", 128, 64, 128, False, 8, 3, 128,
        "two programs as above; with 128 registers, x' of long or unaligned rows does not stay in registers",
    ),
    ScanConfig(
        "long_ampere", 128, 128, 32, False, 8, 3, None,
        "loops over D; pieces of 32 columns keep the register operands of mma.sync small",
    ),
    ScanConfig(
        "long_hopper", 128, 128, 64, False, 4, 3, None,
        "four warps let two programs share a multiprocessor; narrower tiles would read x' more often",
    ),
    ScanConfig(
        "few_rows", 64, 64, 64, False, 4, 4, None,
        "too few rows to fill the device; small tiles and a split codebook make more programs",
    ),
    ScanConfig(
        "long_blackwell", 128, 128, 64, False, 8, 3, None,
        "as for Hopper, with eight warps: with four, the scores of a tile would spill",
    ),
)  # fmt: skip
_BY_NAME = {config.name: config for config in CONFIGS}


def pick_config(
    n: int, k: int, d: int, dtype: torch.dtype, properties: DeviceProperties, *, aligned: bool = True
) -> ScanConfig:
    """Return the configuration, one of CONFIGS, for a search of [n, d] rows among k codes.

    `aligned` means that x's rows are contiguous and a multiple of 16 entries apart, so that they are read without a
    mask. The dtype of x does not matter so far, because the products are float16 for every x.
    """
    major = properties.capability[0]
    tiles = ceil_div(n, 128) * ceil_div(k, 128)
    if d > 64 and tiles < properties.multiprocessors:
        return _BY_NAME["few_rows"]
    aligned = aligned and d % 16 == 0
    # Except on Hopper, longer unaligned rows do not leave x' room in registers.
    longest = 128 if aligned or major == 9 else 32 if major == 8 else 64
    if d > longest:
        return _BY_NAME["long_ampere" if major == 8 else "long_hopper" if major == 9 else "long_blackwell"]
    if major >= 9 and (d > 64 or not aligned):
        return _BY_NAME["medium"]
    # x' and the epilogue fit 128 registers on Hopper only.
    return _BY_NAME["short_shared" if major == 9 else "short"]


def row_pitch(d: int) -> int:
    """Columns of a stored c' row: padded to 16 bytes if D > 4, else to a power of two, at least 2."""
    return ceil_div(d, 8) * 8 if d > 4 else max(2, 1 << (d - 1).bit_length())


def plan_search(n: int, k: int, config: ScanConfig, properties: DeviceProperties) -> SearchPlan:
    """Choose splits that fill the device and need few packed bits."""
    tiles = ceil_div(k, config.block_k)
    programs = max(1, ceil_div(n, config.block_n))
    wanted = max(ceil_div(k, MAX_CODES_PER_SPLIT), properties.multiprocessors // programs)
    tiles_per_split = ceil_div(tiles, min(wanted, tiles)) if wanted > 1 else tiles
    return SearchPlan(config, ceil_div(tiles, tiles_per_split), tiles_per_split)
