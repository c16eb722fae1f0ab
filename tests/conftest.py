"""Prints the versions under test at the head of each run."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "torchvision", "triton", "numpy", "vector-quantize-pytorch")


def pytest_report_header() -> str:
    """One line, such as "python 3.11.7, torch 2.15.0, ..."."""
    return ", ".join([f"python {platform.python_version()}", *(f"{name} {installed(name)}" for name in PACKAGES)])


def installed(package: str) -> str:
    """The package's version, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
