"""Codebooks of Gaussian rows: what each method learns on a small problem, and the table."""

from pathlib import Path

import pytest
import torch

from benchmarks.gaussian_codes import MEAN, METHODS, Options, main
from benchmarks.results import read_rows
from benchmarks.tables.learning import gaussian_table
from vq_kernels import nearest_code

SMALL = {"num_codes": 64, "code_dim": 2, "num_rows": 512, "num_evaluated": 2048}


def run(out: Path, *methods: str, steps: int = 50) -> dict[str, dict[str, float]]:
    main(Options(methods=methods, steps=steps, out=out, **SMALL))
    return {row["method"]: row for row in read_rows(out) if row["step"] == steps}


def test_the_default_uses_all_codes_and_has_the_lowest_error(tmp_path: Path) -> None:
    found = run(tmp_path / "rows.jsonl", *METHODS)
    ours = found.pop("VectorQuantizer(K, D)")
    assert ours["use"] == 1
    assert all(ours["error"] < other["error"] for other in found.values())
    assert found["VQ, SGD"]["use"] < found["CVQ"]["use"]


def test_a_finished_method_is_not_repeated(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    run(out, "SimVQ", steps=3)
    before = out.read_text()
    run(out, "SimVQ", steps=3)
    assert out.read_text() == before
    assert [row["step"] for row in read_rows(out)] == [1, 2, 3]


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(SystemExit, match="got magic"):
        main(Options(methods=("magic",)))


def test_diveq_has_the_gradient_of_the_codebook_loss() -> None:
    torch.manual_seed(0)
    x, codes = torch.randn(100, 4) + MEAN, torch.randn(16, 4, requires_grad=True)
    chosen = codes[nearest_code(x, codes.detach()).indices]
    direction = chosen + 0.1 * torch.randn_like(x) - x
    unit = (direction / direction.norm(dim=1, keepdim=True)).detach()
    diveq = x + (chosen - x).norm(dim=1, keepdim=True) * unit  # Vali et al. 2025, arXiv:2509.26469
    losses = ((output - x).square().mean() for output in (diveq, chosen))
    torch.testing.assert_close(*(torch.autograd.grad(loss, codes, retain_graph=True) for loss in losses))


def test_the_table_shows_measured_and_published_errors(tmp_path: Path) -> None:
    run(tmp_path / "rows.jsonl", "VectorQuantizer(K, D)", "EMA", steps=10)
    rows = read_rows(tmp_path / "rows.jsonl")
    lines = gaussian_table(rows).splitlines()
    first = next(row for row in rows if row["step"] == 1)
    assert lines[2].startswith(f"| VectorQuantizer(K, D) | this library | {first['error']:.3f} |")
    assert [line.split(" | ")[1] for line in lines[3:5]] == ["this library", "published"]
    assert "| EMA | published | 3.508 |  | 2.204 |" in lines[4]
    assert len(lines) == 2 + 2 + 5 + 2
