"""A file of JSON lines, one for each finished piece of a long piece of work, so that it goes on where it stopped."""

import json
from pathlib import Path
from typing import Any

from vqae.checkpoint import write_whole
from vqae.errors import UsageError


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
        self.lines: list[dict[str, Any]] = []
        for number, text in enumerate(file.read_text().splitlines() if file.exists() else [], start=1):
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            if not isinstance(line, dict) or not isinstance(line.get("settings"), dict):
                raise UsageError(f"{file} must hold a result a line, line {number} is none: {text[:60]!r}")
            self.lines.append(line)

    def has(self, piece: dict[str, Any], settings: dict[str, Any]) -> bool:
        """Whether a piece is finished.

        Args:
            piece: the entries that it is called by, such as a method and a seed.
            settings: what it would be made with now.

        Raises:
            UsageError: it was made with other settings; says which.
        """
        for line in self.lines:
            if all(line[name] == value for name, value in piece.items()):
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
        """Write one more line; raises UsageError where the file cannot be written."""
        self.lines.append(line)
        write_whole(self.file, "".join(json.dumps(one) + "\n" for one in self.lines).encode())
