"""The two times below which no search of a shape can stay, and the rates that they stand on. Needs no package."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, int, int]
"""N, K, D."""

_INDEX_BYTES, _DISTANCE_BYTES = 8, 4


@dataclass(frozen=True)
class Rates:
    """What a GPU does in a second.

    Attributes:
        memory_tbs: 10^12 bytes of its memory, read and written.
        matrix_tflops: 10^12 operations of its matrix units in float16.
        source: where both are from.
    """

    memory_tbs: float
    matrix_tflops: float
    source: str


PUBLISHED = {
    "h200": Rates(4.8, 989.0, "published: NVIDIA H200 datasheet, SXM, dense"),
    "h100": Rates(3.35, 989.0, "published: NVIDIA H100 datasheet, SXM, dense"),
}
"""By the folder of a GPU's results. The datasheets give the matrix rate with sparsity, 1,979; dense is half of it."""


def measured_rates(lines: Iterable[dict[str, Any]]) -> Rates | None:
    """The rates in the lines of the search stage; None where one is missing."""
    found = {line["name"]: line["value"] for line in lines if line["op"] == "rate"}
    if not {"copy", "gemm float16"} <= found.keys():
        return None
    return Rates(found["copy"], found["gemm float16"], "measured: a copy of 4 GiB, and a product of side 8,192")


def fewest_bytes(shape: Shape, itemsize: int = 4) -> int:
    """x and the codebook read once; indices, codes and distances written once."""
    n, k, d = shape
    return itemsize * (n + k) * d + n * (_INDEX_BYTES + itemsize * d + _DISTANCE_BYTES)


def byte_floor_ms(shape: Shape, rates: Rates) -> float:
    """The time that moving the fewest bytes takes."""
    return 1e-9 * fewest_bytes(shape) / rates.memory_tbs


def operation_floor_ms(shape: Shape, rates: Rates) -> float:
    """The time that the 2·N·K·D operations of the scores take in float16 on the matrix units."""
    n, k, d = shape
    return 2e-9 * n * k * d / rates.matrix_tflops
