"""The results of a GPU pass: files of JSON lines, each written as soon as it is known, with where it comes from."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""

NO_GPU = "no GPU (rehearsal)"
"""Stands for the GPU's name in lines that were not measured on one."""

_SAME = ("sources", "rehearsal")  # what a line must share with this run to count as done, beside the GPU
_PEERS = ("flash-kmeans", "numpy", "torchvision")


class Results:
    """The lines of one stage, those of earlier runs among them.

    A line counts as done where it comes from the same GPU and the same sources; other lines are kept, and done again.

    Args:
        file: made with the first line.
        header: the entries that every line gets; see `make_header`.
        on_any_gpu: lines of another GPU count too.
    """

    def __init__(self, file: Path, header: Mapping[str, Any], *, on_any_gpu: bool = False) -> None:
        self.file, self.header = file, header
        kept = read_lines(file)
        same = _SAME if on_any_gpu else (*_SAME, "gpu")
        self.lines: list[Line] = [line for line in kept if all(line.get(name) == header[name] for name in same)]
        if file.exists() and not file.read_bytes().endswith(b"\n"):  # a line that was being written when a run died
            file.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def matching(self, **entries: Any) -> Iterator[Line]:
        """The lines that count and have these entries."""
        return (line for line in self.lines if all(line.get(name) == value for name, value in entries.items()))

    def has(self, **entries: Any) -> bool:
        """Whether there is such a line."""
        return any(True for _ in self.matching(**entries))

    def add(self, **entries: Any) -> Line:
        """Write one line, on disk when this returns, and show it in short."""
        line = {**entries, **self.header}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.lines.append(line)
        print("  " + _in_short(entries.items()), flush=True)
        return line


def read_lines(file: Path) -> list[Line]:
    """The objects in a file of JSON lines; none where there is no file. A last line that is cut short is left out.

    Raises:
        ValueError: another line is no JSON object; says which.
    """
    lines: list[Line] = []
    texts = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict):
            lines.append(line)
        elif number < len(texts):
            raise ValueError(f"{file} must hold an object a line, line {number} is none: {text[:60]!r}")
    return lines


def make_header(folders: Sequence[str], commit: str | None, rehearse: bool) -> dict[str, Any]:
    """The entries that every line of a result carries.

    Args:
        folders: those of the checkout whose code the result depends on.
        commit: what to call the commit; None: what git says.
        rehearse: whether this is a run in small, without a GPU; such lines must not be taken for measurements.

    Returns:
        gpu, driver, cuda, python, torch, triton, peers, commit, sources (a digest of the folders), date, rehearsal.
    """
    import torch  # the tables read results without it

    gpu, driver = (NO_GPU, "none") if rehearse else _gpu_and_driver()
    return {
        "gpu": gpu,
        "driver": driver,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peers": {name: _version(name) for name in _PEERS},
        "commit": commit or _output("git", "-C", str(ROOT), "describe", "--always", "--dirty") or "unknown",
        "sources": sources_digest(folders),
        "date": datetime.date.today().isoformat(),
        "rehearsal": rehearse,
    }


def sources_digest(folders: Sequence[str]) -> str:
    """12 hexadecimal digits of the code in these folders: equal digests, equal code, whatever else a commit changed."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _gpu_and_driver() -> tuple[str, str]:
    """The names of the first GPU and of its driver."""
    name, _, driver = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").partition(",")
    return name.strip() or "unknown GPU", driver.partition("\n")[0].strip() or "unknown"


def _output(*command: str) -> str:
    """What a command prints; nothing where it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _in_short(entries: Iterable[tuple[str, Any]]) -> str:
    """A line as a person reads it in a log."""
    shown = []
    for name, value in entries:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        shown.append(f"{name} {text if len(text) <= 60 else text[:57] + '...'}")
    return ", ".join(shown)
