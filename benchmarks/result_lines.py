"""A file of JSON lines, one for each finished piece of a long piece of work, so that it goes on where it stopped."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vqae.runtime.errors import UsageError
from vqae.training.checkpoint import atomic_write


class ResultLines:
    """The finished pieces in a file. Each is written at once, and the file is whole at every moment.

    Args:
        file: made with the first line; what it holds already counts as finished.

    Attributes:
        lines: the file's objects. Each has "settings": what it was made with, beyond what it is called by.

    Raises:
        UsageError: the file holds something else.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lines = self._read()

    def has(self, piece: dict[str, Any], settings: dict[str, Any]) -> bool:
        """Whether a piece is finished.

        Args:
            piece: the entries that it is called by, such as a method and a seed.
            settings: what it would be made with now.

        Raises:
            UsageError: it was made with other settings; says which.
        """
        for line in self.lines:
            if all(line.get(name) == value for name, value in piece.items()):
                before = line["settings"]
                differences = [
                    f"{name} was {before.get(name)}, now {settings.get(name)}"
                    for name in {**before, **settings}
                    if before.get(name) != settings.get(name)
                ]
                if differences:
                    name = ", ".join(f"{name} {value}" for name, value in piece.items())
                    raise UsageError(
                        f"{self.file} holds {name} with other settings ({', '.join(differences)}): "
                        "give another --out, or remove the line"
                    )
                return True
        return False

    def add(self, line: dict[str, Any]) -> None:
        """Write one more line, after those that other processes have written meanwhile.

        Raises:
            UsageError: the file cannot be written, or holds something else by now.
        """
        with self._alone():
            self.lines = [*self._read(), line]
            atomic_write(self.file, "".join(json.dumps(one) + "\n" for one in self.lines).encode())

    def _read(self) -> list[dict[str, Any]]:
        """The file's objects."""
        try:
            text = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{self.file} cannot be read: {error}") from None
        lines = []
        for number, content in enumerate(text.splitlines(), start=1):
            try:
                line = json.loads(content)
            except ValueError:
                line = None
            if not isinstance(line, dict) or not isinstance(line.get("settings"), dict):
                raise UsageError(f"{self.file} must hold a result a line, line {number} is none: {content[:60]!r}")
            lines.append(line)
        return lines

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold other processes off the folder; a file that is replaced cannot be locked itself."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.file.parent, os.O_RDONLY)
        except OSError as error:
            raise UsageError(f"{self.file} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)
