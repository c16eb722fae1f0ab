"""`make docs` builds the site without a warning, and its API reference holds every public name."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import vq_kernels

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built by the Makefile's command into another folder."""
    folder = tmp_path_factory.mktemp("site")
    (arguments,) = re.findall(r"\$\(BIN\)/python (-m mkdocs .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "build/site" in arguments
    command = [sys.executable, *shlex.split(arguments.replace("build/site", shlex.quote(str(folder))))]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    outcome = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    return folder


def headings(page: Path) -> set[str]:
    return set(re.findall(r'<h\d id="([\w.]+)"', page.read_text()))


def test_the_reference_holds_every_public_name(site: Path) -> None:
    found = set().union(*(headings(page) for page in (site / "reference").glob("*.html")))
    assert {f"vq_kernels.{name}" for name in vq_kernels.__all__} <= found
    assert {"vqae.model.vqae.VQAE", "vqae.model.vqae.VQAE.encode", "vqae.config.Config"} <= found


def test_the_reference_shows_the_sections_of_a_docstring(site: Path) -> None:
    page = (site / "reference" / "search.html").read_text()
    section = page[page.index('id="vq_kernels.nearest_code"') : page.index('id="vq_kernels.NearestCode"')]
    for heading in ("Parameters:", "Returns:", "Raises:"):
        assert heading in section


def test_no_description_becomes_a_quotation(site: Path) -> None:
    """Markdown takes a description that begins with ">=" for a quotation and drops the ">"."""
    for page in (site / "reference").glob("*.html"):
        assert "<blockquote>" not in page.read_text(), page.name


def test_every_page_is_in_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f'href="{page.relative_to(ROOT / "docs").with_suffix(".html")}"' in home or page.stem == "index", page
