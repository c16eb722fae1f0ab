"""The files of a run, by name."""

import json
import math
from pathlib import Path
from typing import Any

from vqae.checkpoint import write_whole
from vqae.config import Config
from vqae.errors import UsageError


class RunFolder:
    """Where a run writes: one attribute a file.

    Args:
        path: the folder; made when the first file is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.last = path / "last.pt"
        self.best = path / "best.pt"
        self.reconstructions = path / "reconstructions.png"
        self.codebook = path / "codebook.png"
        self.curves = path / "curves.png"
        self.events = path / "events"

    def files(self) -> list[Path]:
        """The run's files that are there."""
        own = (self.config, self.metrics, self.last, self.best, self.reconstructions, self.codebook, self.curves)
        return [file for file in (*own, *self.events.glob("events.out.tfevents.*")) if file.is_file()]

    def check(self, *, may_be_taken: bool) -> None:
        """Raise UsageError if this is no folder, or if it holds a run that may not be touched."""
        try:
            if self.path.exists() and not self.path.is_dir():
                raise UsageError(f"--out must be a folder, got the file {self.path}")
            names = [file.name for file in self.files()]
        except OSError as error:
            raise UsageError(f"--out {self.path} cannot be read: {error.strerror}") from None
        if names and not may_be_taken:
            ways = "--resume, --overwrite" if self.last.exists() else "--overwrite"
            raise UsageError(
                f"--out {self.path} already holds a run ({', '.join(names)}): give {ways} or another folder"
            )

    def holds_results(self) -> bool:
        """Whether there is more than a run's settings."""
        return any(file != self.config for file in self.files())

    def clear(self) -> None:
        """Remove the files of an earlier run, and nothing else."""
        for file in self.files():
            try:
                file.unlink()
            except OSError as error:
                raise UsageError(f"{file} cannot be removed: {error.strerror}") from None

    def begin(self, config: Config) -> None:
        """Make it the folder of a new run."""
        self.clear()
        self.write_config(config)

    def write_config(self, config: Config) -> None:
        """Write config.json, for `--config`."""
        write_whole(self.config, (json.dumps(config.to_dict(), indent=2) + "\n").encode())

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl, a line an epoch."""
        write_whole(self.metrics, "".join(json_line(line) + "\n" for line in history).encode())


def json_line(values: dict[str, Any]) -> str:
    """The values as JSON, which has no word for a number that is not finite: null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    return json.dumps(finite)
