"""docs/guides/migrating.md lists every keyword of theirs, and states for each what the code does."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from tests.vq_kernels.compat.side_by_side import Theirs
from vq_kernels import VectorQuantize
from vq_kernels.compat.keywords import AT_CONSTRUCTION, IN_A_CALL

TEXT = (Path(__file__).parents[3] / "docs" / "guides" / "migrating.md").read_text()


def rows(after: str) -> dict[str, str]:
    """Returns the status of each name in the first table after a piece of text."""
    table = TEXT[TEXT.index(after) :].split("|---|---|---|\n")[1].split("\n\n")[0]
    return dict(re.findall(r"^\| `(\w+)` \| ([\w ]+) \|", table, flags=re.MULTILINE))


@pytest.mark.parametrize(
    ("after", "theirs", "refused"),
    [
        ("Keywords of the constructor", Theirs, AT_CONSTRUCTION),
        ("Keywords of the forward pass", Theirs.forward, IN_A_CALL),
    ],
)
def test_every_keyword_is_in_its_table(after: str, theirs: Any, refused: dict[str, Any]) -> None:
    listed = rows(after)
    keywords = [name for name in inspect.signature(theirs).parameters if name != "self"]
    assert list(listed) == keywords
    assert {name for name, status in listed.items() if status == "not supported"} == refused.keys()
    assert set(listed.values()) == {"same", "different", "not supported"}


def test_every_public_method_is_named() -> None:
    for name, value in vars(Theirs).items():
        if not name.startswith("_") and name != "forward" and (callable(value) or isinstance(value, property)):
            there = hasattr(VectorQuantize, name)
            if not there and not name.startswith(("update_", "maybe_")):
                pytest.fail(f"{name} is neither there nor named as missing")
            assert f"`{name}`" in TEXT or name.startswith("maybe_")


def test_the_snippet_runs() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet, names)  # noqa: S102
    assert names["quantized"].shape == (1, 1024, 256)
    assert names["indices"].shape == (1, 1024)
    assert names["loss"].shape == ()
