"""The form of the tables: Markdown, and how figures and their origin are written. Needs no package."""

from collections.abc import Iterable, Sequence

from gpu.results import Line

NOT_YET = "not measured yet"


def markdown(rows: Sequence[Sequence[object]], note: str = "") -> str:
    """A table whose first row holds the headings, and a line below it."""
    first, *others = ("| " + " | ".join(map(str, row)) + " |" for row in rows)
    return "\n".join([first, "|---" * len(rows[0]) + "|", *others, *(["", note] if note else [])])


def where(lines: Iterable[Line]) -> str:
    """GPUs, versions, commits and dates of the lines, each only once."""
    parts = []
    for line in lines:
        peers = "".join(f", {name} {version}" for name, version in line["peers"].items() if version)
        parts.append(
            f"{line['gpu']}, driver {line['driver']}, CUDA {line['cuda']}; Python {line['python']}, torch "
            f"{line['torch']}, triton {line['triton']}{peers}; commit {line['commit']}; {line['date']}"
        )
    return " / ".join(dict.fromkeys(parts))


def size_of(line: Line) -> str:
    """N × K × D of a line."""
    return f"{line['N']:,} × {line['K']:,} × {line['D']}"


def milliseconds(value: float) -> str:
    """Three digits of it."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
