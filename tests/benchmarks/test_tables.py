"""The tables of docs/explanations/learning.md: means and spreads, ratios, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import ROOT
from benchmarks.tables import __main__ as tables
from benchmarks.tables import gpu
from benchmarks.tables.__main__ import TABLES, with_tables
from benchmarks.tables.gpu import NOT_MEASURED, gpu_section, gpu_table
from benchmarks.tables.learning import (
    METHODS,
    ablation_table,
    over_seeds,
    rate_distortion_cells,
    rate_distortion_table,
    use_table,
    vqvae_table,
)
from benchmarks.tables.rows import spread

ENVIRONMENT = {"device": "a CPU", "versions": "torch 2", "date": "2026-01-01"}
SETTINGS = {"lr": 0.3, "flip": False, "limit": None, "num_codes": 512, "epochs": 6, "dataset": "imagefolder"}


def ablation_line(variant: str, seed: int, test_mse: float, **overrides: Any) -> dict[str, Any]:
    figures = {"train_mse": 0.01, "val_mse": 0.02, "test_mse": test_mse, "codes_used": 9, "perplexity": 8.4}
    names = {"variant": variant, "overrides": overrides, "seed": seed, "diverged": False, "minutes": 1.25}
    return {**names, **figures, "settings": {**SETTINGS, **overrides}, **ENVIRONMENT}


def point(method: str, num_codes: int, seed: int, mse: float) -> dict[str, Any]:
    figures = {f"{split}_{name}": mse for split in ("train", "test") for name in ("mse", "perplexity", "codes_used")}
    row = {"method": method, "num_codes": num_codes, "num_quantizers": 1, "seed": seed, "settings": SETTINGS}
    return {**row, **figures, **ENVIRONMENT}


def test_spread() -> None:
    assert spread([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    assert spread([0.03], 4) == "0.0300"
    assert spread([], 4) == ""


def test_the_vqvae_compares_runs_of_the_same_seed_and_length() -> None:
    same = {"perplexity": 9.0, "batch_size": 64, "dataset": "imagefolder", **ENVIRONMENT}
    lines = [
        {"method": "first", "seed": 0, "steps": 800, "mse": 0.02, "time": 1.0, **same},
        {"method": "first", "seed": 1, "steps": 800, "mse": 0.03, **same},
        {"method": "other", "seed": 1, "steps": 800, "mse": 0.06, "time": 1.5, **same},
        {"method": "other", "seed": 2, "steps": 800, "mse": 0.04, "time": 2.5, **same},
        {"method": "first", "seed": 0, "steps": 400, "mse": 0.05, "time": 1.0, **same, "perplexity": 5.0},
    ]
    table = vqvae_table(lines).splitlines()
    assert table[:4] == [
        "| quantizer | seeds | MSE, 400 steps | relative | MSE, 800 steps | relative | perplexity | CPU time |",
        "|---|---|---|---|---|---|---|---|",
        "| first | 2 | 0.05000 | 1.00 | 0.02500 ± 0.00707 | 1.00 ± 0.00 | 9 ± 0 | 1.00 |",
        "| other | 2 |  |  | 0.05000 ± 0.01414 | 2.00 | 9 ± 0 | 2.00 ± 0.71 |",
    ]
    for steps in (400, 800):
        assert f"--steps {steps}`: a CPU; torch 2; 2026-01-01." in table[-1]


def test_variants_stand_in_the_order_of_their_first_lines() -> None:
    lines = [
        ablation_line("default", 0, 0.03),
        ablation_line("mirrored", 0, 0.04, flip=True),
        ablation_line("default", 1, 0.05),
    ]
    table = ablation_table(lines).splitlines()
    assert table[:4] == [
        "| variant | seeds | train MSE | validation MSE | test MSE | codes used | perplexity |",
        "|---|---|---|---|---|---|---|",
        "| default | 2 | 0.01000 ± 0.00000 | 0.02000 ± 0.00000 | 0.04000 ± 0.01414 | 9 ± 0 | 8 ± 0 |",
        "| mirrored | 1 | 0.01000 | 0.02000 | 0.04000 | 9 | 8 |",
    ]
    what = "K = 512, 6 epochs of all training images (imagefolder); a CPU; torch 2; 2026-01-01."
    assert table[4:] == ["", f"Mean ± standard deviation over the seeds; {what}"]


def test_a_run_that_diverged_has_no_figures() -> None:
    lost = {"variant": "wild", "overrides": {"lr": 9.0}, "seed": 0, "diverged": True, **ENVIRONMENT}
    lost["settings"] = {**SETTINGS, "lr": 9.0}
    table = ablation_table([ablation_line("default", 0, 0.03), lost])
    assert "| wild | 1, 1 diverged | - | - | - | - | - |" in table
    both = ablation_table([lost, ablation_line("wild", 1, 0.05, lr=9.0)])
    assert "| wild | 2, 1 diverged | 0.01000 | 0.02000 | 0.05000 | 9 | 8 |" in both


def test_a_run_without_validation_images() -> None:
    line = ablation_line("default", 0, 0.03)
    del line["val_mse"]
    assert "| default | 1 | 0.01000 | - | 0.03000 |" in ablation_table([line])


def test_variants_of_different_defaults_are_not_one_table() -> None:
    other = ablation_line("mirrored", 0, 0.04, flip=True)
    other["settings"]["lr"] = 0.5
    with pytest.raises(SystemExit, match="'mirrored' and 'default' differ in lr"):
        ablation_table([ablation_line("default", 0, 0.03), other])


def test_a_variant_of_other_overrides_is_not_the_same() -> None:
    lines = [ablation_line("mirrored", 0, 0.04, flip=True), ablation_line("default", 0, 0.03)]
    with pytest.raises(SystemExit, match="'default' and 'default' differ in flip"):
        ablation_table([*lines, {**lines[1], "settings": {**SETTINGS, "flip": 3}}])
    with pytest.raises(SystemExit, match="'mirrored' and 'mirrored' differ in flip"):
        ablation_table([*lines, ablation_line("mirrored", 1, 0.04, flip=3)])


def test_seeds_of_other_settings_have_no_mean() -> None:
    lines = [point("model", 2, 0, 4.0), {**point("model", 2, 1, 1.0), "settings": {**SETTINGS, "lr": 1.0}}]
    with pytest.raises(SystemExit, match="the results of model at K = 2 differ in their settings"):
        rate_distortion_cells(lines)


def test_the_model_beside_kmeans() -> None:
    lines = [point("kmeans", 16, seed, 0.25) for seed in (0, 1)] + [point("model", 16, 0, 0.5), point("model", 3, 0, 1)]
    assert rate_distortion_cells(lines)[1:] == [
        ["3", "1.58", "model", "1.00000", "1.00000", "", "", "1", "1"],
        ["16", "4", "K-means", "0.25000 ± 0.00000", "0.25000 ± 0.00000", "", "", "0 ± 0", "0 ± 0"],
        ["16", "4", "model", "0.50000", "0.50000", "2.000", "2.000", "0", "0"],
    ]
    table = rate_distortion_table(lines).splitlines()
    assert table[0] == "| K | bits | by | train MSE | test MSE | train ratio | test ratio | perplexity | codes used |"
    assert {line.count("|") for line in table[:5]} == {10}


def test_ratios_are_of_the_means_over_seeds() -> None:
    lines = [
        point("kmeans", 2, 0, 1.0),
        point("kmeans", 2, 1, 3.0),
        point("model", 2, 0, 4.0),
        point("model", 2, 1, 1.0),
    ]
    assert rate_distortion_cells(lines)[2][5:7] == ["1.250", "1.250"]


def test_figures_of_a_method_at_one_k() -> None:
    lines = [point("kmeans", 2, 0, 1.0), point("kmeans", 4, 0, 3.0), point("model", 2, 0, 4.0)]
    assert list(METHODS) == ["kmeans", "model"]
    assert over_seeds(lines, "kmeans", 4, "test_mse") == [3.0]
    assert over_seeds(lines, "model", 4, "test_mse") == []


def test_codes_in_use_by_size_and_batch() -> None:
    def run(num_codes: int, batch_size: int, used: int) -> dict[str, Any]:
        row = {**point("model", num_codes, 0, 0.03), "settings": {"batch_size": batch_size, "epochs": 2}}
        figures = {"test_perplexity": used / 2, "train_codes_used": used + 1, "num_train": 2000, "num_test": 1000}
        return {**row, **figures, "test_codes_used": used}

    table = use_table([run(512, 1024, 500), run(512, 64, 480), run(2, 64, 2)]).splitlines()
    assert table[2:5] == [
        "| 2 | 64 | 0.03000 | 1 | 2 | 3 |",
        "| 512 | 64 | 0.03000 | 240 | 480 | 481 |",
        "| 512 | 1,024 | 0.03000 | 250 | 500 | 501 |",
    ]
    assert "2 epochs of 2,000 training images" in table[-1]


def test_without_results_the_tables_say_so() -> None:
    assert ablation_table([]) == rate_distortion_table([]) == use_table([]) == "No results are committed yet."


# -- the documents


def test_the_documents_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out
    shown = {name for file in tables.documents() for name in TABLES if f"<!-- begin {name} -->" in file.read_text()}
    assert shown >= {
        "model",
        "search",
        "gpu-search",
        "gpu",
        "step",
        "codecs",
        "upstream",
        "ablation",
        "rate-distortion",
        "use",
        "k-means",
        "residual",
        "product",
    }


def test_a_changed_figure_is_found() -> None:
    text = (ROOT / "README.md").read_text()
    changed = text.replace("0 of 10,000,000", "1 of 10,000,000")
    assert changed != text
    assert with_tables(changed, "README.md") == text


@pytest.mark.parametrize("marker", ["<!-- begin search -->", "<!-- begin unknown -->\n<!-- end unknown -->"])
def test_a_marker_without_end_or_of_an_unknown_table_is_an_error(marker: str) -> None:
    with pytest.raises(
        SystemExit, match=r"page\.md: <!-- begin .* must name one of model, search, .*followed by <!-- end"
    ):
        with_tables(f"text\n{marker}\n", "page.md")


def test_documents_are_updated_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "docs" / "glossary.md"
    page.parent.mkdir(parents=True)
    (tmp_path / "README.md").write_text("no tables")
    page.write_text("before\n<!-- begin step -->\nold\n<!-- end step -->\nafter\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.main(["--check"]) == 1
    assert capsys.readouterr().out == "docs/glossary.md differs from the results\n"
    assert tables.main([]) == 0
    assert tables.main(["--check"]) == 0
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("before\n<!-- begin step -->\n| ")
    assert text.endswith("\n<!-- end step -->\nafter\n")


# -- GPU


def test_without_results_one_sentence_says_so() -> None:
    part = {"op": "part", "part": "times", **ENVIRONMENT}
    assert gpu_section([]) == gpu_section([part]) == NOT_MEASURED
    graph = {"op": "nearest_code", "graph": True, "N": 1, "K": 1, "D": 1, "contender": "triton", **ENVIRONMENT}
    assert gpu_table("gpu-search", []) == gpu_table("gpu-search", [part, graph]) == ""
    counts = {"rows": 10, "wrong": 0, "certified": 9, "reranked": 1, "exhaustive": 0}
    section = gpu_section([part, {"op": "exactness", "seed": 0, "data": {"gaussian": counts}, **ENVIRONMENT}])
    assert section.startswith("Exactness:\n\n| data set | rows |")
    assert "| gaussian | 10 | 0 | 90.00 | 10.00 | 0.00 |" in section


def test_dry_runs_are_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    file = tmp_path / "h100" / "gpu.jsonl"
    file.parent.mkdir()
    file.write_text('{"op": "part", "dry_run": true}\n')
    assert gpu.gpu_rows() == []
    file.write_text('{"op": "part", "dry_run": true}\n{"op": "part", "dry_run": false}\n')
    assert gpu.gpu_rows() == [{"op": "part", "dry_run": False}]


def test_throughput_and_targets() -> None:
    row = {
        **{"op": "nearest_code", "graph": False, "N": 1_048_576, "K": 4096, "D": 64, "contender": "triton"},
        **{"p50_ms": 2.0, "tflops": 275.0, "wrong_percent": 0.0, **ENVIRONMENT},
    }
    wrong = {**row, "contender": "gemm-tf32", "tflops": 300.0, "wrong_percent": 1.25}
    assert "| this library, exact | 275 |\n| bare GEMM, TF32 | 300 (1.2 % wrong) |" in gpu_table(
        "gpu-search", [row, wrong]
    )
    soak = {"op": "exactness", "seed": 0, "rows": 100, "wrong": 2, **ENVIRONMENT}
    lines = gpu_table("bars", [row, soak]).splitlines()
    assert "| D = 64: 400 TFLOP/s on an H200 | 275 TFLOP/s |" in lines
    assert "| D = 128: 550 TFLOP/s on an H200 | - |" in lines
    assert "| 0 wrong of 10⁹ rows | 2 of 100 |" in lines
    assert lines[-1] == "a CPU; torch 2; 2026-01-01."
