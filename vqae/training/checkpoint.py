"""Checkpoints: written whole or not at all, and read with suspicion."""

import contextlib
import errno
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from vqae.config import Config
from vqae.runtime.errors import UsageError

FORMAT = "vqae checkpoint 1"
_MODEL_KEYS = ("config", "dataset", "image_size", "model")  # what a model is used by


def atomic_write(file: Path, data: bytes | memoryview) -> None:
    """Replace `file` by `data`, or leave it as it was: temporary file, fsync, rename.

    Raises:
        UsageError: the disk is full, or the folder cannot be written to.
    """
    temporary = file.with_name(f".{file.name}.part")  # of a process that was killed, the next write takes it over
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UsageError(
                f"no space left on the disk for {file} ({len(data)} bytes); what was there is kept"
            ) from None
        raise UsageError(f"{file} cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_checkpoint(file: Path, state: dict[str, Any]) -> None:
    """Write a dict of tensors and plain values; raises UsageError as `atomic_write` does."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    atomic_write(file, buffer.getbuffer())


def load_checkpoint(file: Path) -> dict[str, Any]:
    """The dict that `save_checkpoint` wrote, on the CPU.

    Raises:
        UsageError: the file is missing, cut short, or not a checkpoint of this program.
    """
    try:
        if not file.is_file():
            raise UsageError(f"checkpoint {file} {'is no file' if file.exists() else 'does not exist'}")
    except OSError as error:
        raise UsageError(f"checkpoint {file} cannot be read: {error.strerror}") from None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UsageError(f"checkpoint {file} cannot be read: {error.strerror}") from None
    except Exception:  # torch.load fails in a dozen ways on bytes that it did not write
        raise UsageError(f"{file} is not a checkpoint, or it is cut short or damaged") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or not state.keys() >= set(_MODEL_KEYS):
        raise UsageError(f"{file} is not a checkpoint of this program ({FORMAT!r})")
    if "pictures" in state:  # the name in version 0.1; to be removed after one release
        state["images"] = state.pop("pictures")
    return state


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
        atomic_write(self.config, (json.dumps(config.to_dict(), indent=2) + "\n").encode())

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl, a line an epoch."""
        atomic_write(self.metrics, "".join(json_line(line) + "\n" for line in history).encode())


def json_line(values: dict[str, Any]) -> str:
    """The values as JSON, which has no word for a number that is not finite: null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    return json.dumps(finite)
