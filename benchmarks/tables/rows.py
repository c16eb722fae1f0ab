"""What the tables share: the committed rows, and how figures are shown."""

import statistics
from collections.abc import Sequence

from benchmarks.results import RESULTS, Row, read_rows

NO_RESULTS = "No results are committed yet."


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± sample standard deviation over seeds; only the mean for a single seed, nothing for none."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}" if values else ""


def where(rows: Sequence[Row]) -> str:
    """The different devices, versions and dates of the rows."""
    return "; ".join(", ".join(sorted({row[name] for row in rows})) for name in ("device", "versions", "date"))


def size_of(row: Row) -> str:
    """The sizes of a search."""
    return f"{row['N']:,} × {row['K']:,} × {row['D']}"


def cpu_rows(name: str) -> list[Row]:
    """The committed rows of a file of CPU results."""
    return read_rows(RESULTS / "cpu" / f"{name}.jsonl")


def wrong(row: Row) -> str:
    """The share of wrong indices in brackets, if there are any."""
    return f" ({row['wrong_percent']:.2g} % wrong)" if row.get("wrong_percent") else ""
