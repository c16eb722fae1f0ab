"""The API reference is made from the docstrings, as `make docs` does, without a warning."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import vq_kernels

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the Makefile's command fills, in another place."""
    folder = tmp_path_factory.mktemp("reference")
    (arguments,) = re.findall(r"^\t\$\(BIN\)/python (-W error -m pdoc .*)$", (ROOT / "Makefile").read_text(), re.M)
    assert "build/reference" in arguments
    command = [sys.executable, *shlex.split(arguments.replace("build/reference", shlex.quote(str(folder))))]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    return folder


def test_every_public_name_has_its_section(reference: Path) -> None:
    page = (reference / "vq_kernels.html").read_text()
    assert sorted(re.findall(r'<section id="(\w+)"', page)) == sorted(vq_kernels.__all__)
    assert '<section id="VQAE"' in (reference / "vqae" / "model.html").read_text()


def test_what_the_docstrings_say_is_there(reference: Path) -> None:
    page = (reference / "vq_kernels.html").read_text()
    section = page[page.index('<section id="nearest_code"') :]
    for heading in ("Arguments", "Returns", "Raises"):
        assert f'<h6 id="{heading.lower()}' in section, heading
