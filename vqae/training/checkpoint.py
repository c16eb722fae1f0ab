"""Checkpoints and the folder of a run. Files are replaced atomically."""

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
_MODEL_KEYS = {"config", "dataset", "image_size", "model"}  # what is needed to load the model


def atomic_write(file: Path, data: bytes | memoryview) -> None:
    """Replace `file` by `data` or leave it unchanged: write a temporary file, fsync, rename.

    Raises UsageError if the disk is full or the folder is not writable.
    """
    temporary = file.with_name(f".{file.name}.part")  # a killed process may leave it; the next write overwrites it
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError as error:
        raise write_error(file, error, memoryview(data).nbytes) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_error(file: Path, error: OSError, num_bytes: int | None = None) -> UsageError:
    """The message for a file that cannot be written. `num_bytes` is its size, if that is known."""
    if error.errno == errno.ENOSPC:
        size = "" if num_bytes is None else f" (the new one has {num_bytes:,} bytes)"
        return UsageError(f"no space left on the disk for {file}; existing files are kept{size}")
    return UsageError(f"{file} cannot be written: {error.strerror}")


def save_checkpoint(file: Path, state: dict[str, Any]) -> None:
    """Write a dict of tensors and plain values, as `atomic_write` does."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    atomic_write(file, buffer.getbuffer())


def load_checkpoint(file: Path) -> dict[str, Any]:
    """Read the dict that `save_checkpoint` wrote, to the CPU. Raises UsageError for any other file."""
    try:
        file.open("rb").close()
    except OSError as error:
        raise UsageError(f"checkpoint {file} cannot be read: {error.strerror}") from None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # torch.load fails in many ways on other files
        raise UsageError(f"{file} is not a checkpoint, or it is truncated or damaged") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or not state.keys() >= _MODEL_KEYS:
        raise UsageError(f"{file} is not a checkpoint of this program ({FORMAT!r})")
    if "pictures" in state:  # the key of version 0.1, to be removed after one release
        state["images"] = state.pop("pictures")
    return state


class RunFolder:
    """The output folder of a run, with one attribute for each file. It is created with the first file."""

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
        """The files of the run that exist."""
        own = (self.config, self.metrics, self.last, self.best, self.reconstructions, self.codebook, self.curves)
        return [file for file in (*own, *self.events.glob("events.out.tfevents.*")) if file.is_file()]

    def check(self, *, may_replace: bool) -> None:
        """Raise UsageError if the path is not a folder, or if it holds a run that must not be replaced."""
        try:
            if os.path.lexists(self.path) and not self.path.is_dir():
                kind = "link" if self.path.is_symlink() else "file"
                raise UsageError(f"--out must be a folder, got the {kind} {self.path}")
            names = [file.name for file in self.files()]
        except OSError as error:
            raise UsageError(f"--out {self.path} cannot be read: {error.strerror}") from None
        if names and not may_replace:
            options = "--resume, --overwrite" if self.last.exists() else "--overwrite"
            raise UsageError(
                f"--out {self.path} already holds a run ({', '.join(names)}): use {options} or another folder"
            )

    def begin(self, config: Config) -> None:
        """Remove the files of an earlier run, and nothing else, and write config.json."""
        for file in self.files():
            try:
                file.unlink()
            except OSError as error:
                raise UsageError(f"{file} cannot be removed: {error.strerror}") from None
        self.write_config(config)

    def write_config(self, config: Config) -> None:
        """Write config.json, which --config reads."""
        atomic_write(self.config, (json.dumps(config.to_dict(), indent=2) + "\n").encode())

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl, one line per epoch."""
        atomic_write(self.metrics, "".join(json_line(line) + "\n" for line in history).encode())


def json_line(values: dict[str, Any]) -> str:
    """The values as JSON. Numbers that are not finite become null."""
    return json.dumps(
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
    )
