"""What a pass needs that may not be on the machine: packages from a folder of wheels, pictures from an archive."""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

_IMPORTED = ("tyro",)  # really, since what it needs itself may be missing or too old


def unpack_wheels(wheels: Path, folder: Path) -> list[str]:
    """Put the packages that are missing here, or older, in a folder where this process and its own find them first.

    Returns:
        The names of these wheels.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    taken = [wheel for wheel in sorted(wheels.glob("*.whl")) if _is_wanted(wheel)]
    for wheel in taken:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)  # noqa: S202 - the user names them
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    importlib.invalidate_caches()
    return [wheel.name for wheel in taken]


def _is_wanted(wheel: Path) -> bool:
    """Whether the package of a wheel is not installed, or in an older version."""
    name, version = wheel.name.split("-")[:2]
    try:
        return _numbers(importlib.metadata.version(name)) < _numbers(version)
    except importlib.metadata.PackageNotFoundError:
        return True


def _numbers(version: str) -> list[int]:
    """The release of a version, 4.14.0 as [4, 14, 0]."""
    release = re.match(r"[0-9.]*", version)
    return [int(part) for part in (release[0] if release else "").split(".") if part]


def missing_modules(names: Iterable[str]) -> list[str]:
    """Those of the modules that cannot be imported, each with the reason."""
    missing = [f"{name} is not installed" for name in names if importlib.util.find_spec(name) is None]
    for name in () if missing else (name for name in names if name in _IMPORTED):
        try:
            importlib.import_module(name)
        except ImportError as error:  # what it needs itself
            missing.append(f"{name} cannot be imported: {error}")
    return missing


def unpack_pictures(archive: Path, folder: Path) -> Path:
    """The pictures of a tar archive, unpacked into a folder once: the folder in it that holds train/.

    Raises:
        ValueError: there is none.
    """
    if not folder.is_dir():
        part = folder.with_name(folder.name + ".part")  # so that what was cut short is not taken for the whole
        shutil.rmtree(part, ignore_errors=True)
        with tarfile.open(archive) as opened:
            opened.extractall(part, filter="data")
        part.rename(folder)
    for found in (folder, *sorted(folder.iterdir())):
        if (found / "train").is_dir() or (found / "cifar-10-batches-py").is_dir():
            return found
    raise ValueError(f"--data-dir must hold train/<class>/* and test/<class>/*, got {archive}")
