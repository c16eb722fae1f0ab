"""The runner of the tests of vector-quantize-pytorch, on tests of our own."""

import json
from pathlib import Path

import pytest

from benchmarks import upstream_tests
from benchmarks.upstream_tests import Options
from vqae.runtime.errors import UsageError

TESTS = """
import pytest
import torch
from vector_quantize_pytorch import FSQ, HierarchicalVQ, ResidualVQ, VectorQuantize


def test_supported():
    assert VectorQuantize(dim=4, codebook_size=8)(torch.randn(1, 5, 4))[1].shape == (1, 5)


@pytest.mark.parametrize("beam_size", [1, 2])
def test_beams(beam_size):
    ResidualVQ(dim=4, codebook_size=8, num_quantizers=2, beam_size=beam_size)


def test_built_of_ours():
    layer = HierarchicalVQ(dim=4, codebook_size=8, scales=(1, 2))
    assert type(layer.vq).__module__ == "vq_kernels.compat.vector_quantize"


def test_without_search():
    FSQ(levels=[4, 4])
"""


def test_it_prints_the_outcomes_on_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_theirs.py").write_text(TESTS)
    out = tmp_path / "new" / "line.jsonl"
    assert upstream_tests.main(Options(tests=tmp_path, out=out)) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines == [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {line["test"].removeprefix("test_theirs.py::"): (line["ours"], line["theirs"]) for line in lines}
    assert found == {
        "test_supported": ("passed", "passed"),
        "test_beams[1]": ("passed", "passed"),
        "test_beams[2]": ("failed", "passed"),
        "test_built_of_ours": ("passed", "failed"),
    }
    assert lines[2]["reason"].startswith("NotImplementedError: beam_size is not supported; it must be None or 1, got 2")
    assert lines[0]["classes"] == ["VectorQuantize"]


def test_a_failure_that_is_not_of_a_keyword_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"ours": "failed", "theirs": "passed", "reason": "AssertionError: "}
    monkeypatch.setattr(upstream_tests, "run", lambda tests: [row])
    assert upstream_tests.main(Options(tests=Path())) == 1


def test_a_folder_without_tests(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--tests must be a folder of tests, got"):
        upstream_tests.outcomes(tmp_path, replace=False)
