"""docs/guides/migrating.md lists every keyword of theirs, and states for each what the code does."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import vector_quantize_pytorch

from tests.vq_kernels.compat.side_by_side import Theirs
from vq_kernels import VectorQuantize
from vq_kernels.compat.keywords import AT_CONSTRUCTION, IN_A_CALL, RESIDUAL, RESIDUAL_WITHOUT_EFFECT, WITHOUT_EFFECT

TEXT = (Path(__file__).parents[3] / "docs" / "guides" / "migrating.md").read_text()

CALLS = [
    one
    for layer in (vector_quantize_pytorch.ResidualVQ, vector_quantize_pytorch.GroupedResidualVQ)
    for one in (layer, layer.forward)
]


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
    assert set(listed.values()) == {"same", "different", "not supported", "no effect"}
    no_effect = {name for name, status in listed.items() if status == "no effect"}
    assert no_effect == WITHOUT_EFFECT & set(keywords)


def test_every_public_method_is_named() -> None:
    for name, value in vars(Theirs).items():
        if not name.startswith("_") and name != "forward" and (callable(value) or isinstance(value, property)):
            there = hasattr(VectorQuantize, name)
            if not there and not name.startswith("maybe_"):
                pytest.fail(f"{name} is missing")
            assert f"`{name}`" in TEXT or name.startswith("maybe_")


def test_the_snippets_run() -> None:
    plain, residual = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(plain, names)  # noqa: S102
    assert names["quantized"].shape == (1, 1024, 256)
    assert names["indices"].shape == (1, 1024)
    assert names["loss"].shape == ()
    exec(residual, names)  # noqa: S102
    assert names["quantized"].shape == names["restored"].shape == (1, 1024, 256)
    assert names["indices"].shape == (1, 1024, 8)
    assert names["losses"].shape == (8,)


def test_every_keyword_of_residual_vq_is_named() -> None:
    section = TEXT[TEXT.index("## ResidualVQ") : TEXT.index("## Fixed here")]
    listed = dict(re.findall(r"^\| (`.*`) \| ([\w ]+) \|", section, flags=re.MULTILINE))
    statuses = {name: status for names, status in listed.items() for name in re.findall(r"`(\w+)`", names)}
    named = {
        one.name for call in CALLS for one in inspect.signature(call).parameters.values() if one.kind != one.VAR_KEYWORD
    }
    assert named - {"self", "x", "sample_codebook_temp"} <= statuses.keys()
    assert {name for name, status in statuses.items() if status == "not supported"} == RESIDUAL.keys()
    assert {name for name, status in statuses.items() if status == "no effect"} == RESIDUAL_WITHOUT_EFFECT
