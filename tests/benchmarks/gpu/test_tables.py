"""The floors, the predictions, and the tables of performance.md: figures only where something was measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import measured, predict, predict_training, tables
from gpu.floors import PUBLISHED, byte_floor_ms, fewest_bytes, measured_rates, operation_floor_ms
from gpu.measured import PREDICTIONS, TRAINING_PREDICTIONS, folder_name
from gpu.results import Results, read_lines
from gpu.table_form import NOT_YET
from gpu.tables import TABLES, readme_table
from torch import nn

from vq_kernels.search.triton.plan import CONFIGS, SearchPlan

HEADER: dict[str, Any] = {
    "gpu": "NVIDIA H200", "driver": "580.1", "cuda": "13.0", "python": "3.12", "torch": "2.11", "triton": "3.6",
    "peers": {"flash-kmeans": "0.3", "numpy": None}, "commit": "abc", "sources": "1", "date": "2026-01-02",
    "rehearsal": False,
}  # fmt: skip
H200 = PUBLISHED["h200"]
BAR = {"N": 1_048_576, "K": 4_096, "D": 64}
Add = Callable[..., None]


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Add:
    """Adds a line to a stage's results, which begin empty."""
    monkeypatch.setattr(measured, "RESULTS", tmp_path)

    def add_line(stage: str, header: dict[str, Any] = HEADER, folder: str = "h200", **entries: Any) -> None:
        Results(tmp_path / folder / f"{stage}.jsonl", header).add(**entries)

    return add_line


def searched(contender: str, p50_ms: float, **entries: Any) -> dict[str, Any]:
    usual = {"dtype": "float32", "data": "gaussian", "status": "ok", "tflops": 2e-9 * 2**32 * 64 / p50_ms}
    return {"op": "nearest_code", "contender": contender, **BAR, **usual, "p50_ms": p50_ms, **entries}


# -- floors and predictions


def test_the_floors_by_hand() -> None:
    assert fewest_bytes((10, 3, 2)) == 4 * 2 * 13 + 10 * (8 + 8 + 4)
    assert operation_floor_ms((1_048_576, 4_096, 512), H200) == pytest.approx(2 * 2**20 * 2**12 * 2**9 / 989e9)
    assert byte_floor_ms((1_048_576, 4_096, 512), H200) == pytest.approx(0.899, abs=1e-3)


def test_measured_rates_replace_the_published_ones_when_both_are_there() -> None:
    lines = [{"op": "rate", "name": "copy", "value": 4.3}, {"op": "memory"}]
    assert measured_rates(lines) is None
    found = measured_rates([*lines, {"op": "rate", "name": "gemm float16", "value": 800.0}])
    assert found is not None
    assert (found.memory_tbs, found.matrix_tflops) == (4.3, 800.0)


def test_every_shape_is_predicted_above_its_floors() -> None:
    lines = read_lines(PREDICTIONS)
    assert [(line["N"], line["K"], line["D"]) for line in lines] == list(predict.SHAPES)
    for line, shape in zip(lines, predict.SHAPES, strict=True):
        assert max(byte_floor_ms(shape, H200), operation_floor_ms(shape, H200)) < line["low_ms"]
        assert line["low_ms"] <= line["high_ms"]
        assert {"commit", "sources", "triton", "date"} <= set(line)


def compiled_line(config: str, **entries: Any) -> dict[str, Any]:
    usual = {"registers": 128, "shared_bytes": 40_960, "instructions_per_element": 4.0}
    return {"config": config, **usual, **entries}


def test_a_prediction_by_hand() -> None:
    """1,048,576 x 4,096 x 64 in tiles of 128 x 64, two programs a multiprocessor, bound by the epilogue."""
    line = predict.predict((1_048_576, 4_096, 64), [compiled_line("short_shared D=64 float32")])
    assert (line["config"], line["programs_a_multiprocessor"], line["launches"]) == ("short_shared", 2, 9)
    waves, tiles = -(-8192 // 264), 64
    clocks = waves * 2 * tiles * 128 * 64 * 4.0 / 64
    assert line["epilogue_ms"] == pytest.approx(clocks * 1e-6 / 1.83)
    assert line["matrix_ms"] == pytest.approx(line["epilogue_ms"] * (64 / 2048) / (4 / 64))
    assert line["low_ms"] == line["high_ms"] == pytest.approx(line["epilogue_ms"] + line["rest_ms"])


def test_a_prediction_takes_the_kernel_that_is_nearest() -> None:
    lines = [
        compiled_line("medium D=128 float32"),
        compiled_line("medium D=100 float32"),
        compiled_line("medium D=100 float32 split"),
        compiled_line("medium D=100 bfloat16"),
        compiled_line("medium D=100 float32 unaligned"),
        compiled_line("long_hopper D=100 float32"),
    ]
    medium = next(config for config in CONFIGS if config.name == "medium")
    assert predict.compiled(lines, medium, 96, split=False) is lines[1]
    assert predict.compiled(lines, medium, 96, split=True) is lines[2]


def test_launches_are_counted() -> None:
    short, looped = CONFIGS[0], next(config for config in CONFIGS if not config.resident)
    assert predict.launches(1000, SearchPlan(short, 1, 8, 1024)) == 9
    assert predict.launches(1000, SearchPlan(looped, 2, 8, 1024)) == 11
    assert predict.launches(1025, SearchPlan(short, 1, 8, 1024)) == 13


# -- the tables


@pytest.mark.parametrize("name", TABLES)
def test_without_results_a_table_says_so(add: Add, name: str) -> None:
    assert (NOT_YET in TABLES[name]()) == ("predictions" not in name)
    assert HEADER["driver"] not in TABLES[name]()


def test_a_rehearsal_is_no_measurement(add: Add) -> None:
    add("search", {**HEADER, "rehearsal": True}, **searched("triton", 1.0))
    assert readme_table() == "On a GPU: not measured yet."


def test_the_readme_compares_at_the_bars(add: Add) -> None:
    add("search", **searched("flash-kmeans", 2.5, wrong_percent=0.54321))
    add("search", **searched("triton", 1.25, wrong_percent=0.0))
    add("search", **searched("triton", 9.9, dtype="float16"))
    add("search", **searched("gemm", 9.9, status="out of memory"))
    lines = readme_table().splitlines()
    assert lines[2:4] == [
        "| this library, exact | 440 |  |  |  |",
        "| flash-kmeans (TF32) | 220 (0.54 % wrong) |  |  |  |",
    ]
    assert len([line for line in lines if line.startswith("|")]) == 4
    assert lines[-1] == "![Throughput of the searches on a GPU by D](docs/images/gpu_search.png)"
    assert lines[-3].endswith(
        "NVIDIA H200, driver 580.1, CUDA 13.0; Python 3.12, torch 2.11, triton 3.6, flash-kmeans 0.3; commit abc; "
        "2026-01-02."
    )


def test_the_last_line_of_a_thing_counts(add: Add) -> None:
    add("search", **searched("triton", 5.0))
    add("search", {**HEADER, "sources": "2"}, **searched("triton", 1.25))
    assert "| 440 |" in readme_table()


def test_the_bars_are_held_against_the_results(add: Add) -> None:
    add("search", **searched("flash-kmeans", 2.5))
    add("search", **searched("triton", 1.25))
    add("search", **searched("gemm-16bit", 1.0))
    add("search", op="replay", contender="triton", N=256, K=512, D=512, status="ok", warm_us=8.76, cold_us=12.34)
    add("search", op="memory", **BAR, dtype="float32", data="gaussian", extra_mib=24.5, limit_mib=163.8, within=True)
    for turn, wrong in ((0, 0), (1, 2)):
        add("exactness", part="gaussian", turn=turn, rows=10**6, wrong=wrong)
    add("checks", op="sanitizer", tool="memcheck", status="clean")
    add("training", op="run", status="ok", epochs=8, flags="--amp", seconds_to_target=12.34, test_mse=0.0299)
    for flags, learning in (("", 6000.0), ("--amp", 9000.0)):
        rates = {"learning_images_per_s": learning, "resting_images_per_s": None if flags else 15_000.0}
        add("training", op="run", status="ok", epochs=12, flags=flags, seconds_to_target=20.0, test_mse=0.0299, **rates)
    add("training", op="loop", images_per_s=3000.0)
    add("training", op="step", model="plain", amp=False, p50_ms=9.0)
    add("training", op="step", model="this library", amp=False, p50_ms=3.0)
    lines = TABLES["bars"]().splitlines()
    assert lines[-1] == "NVIDIA H200; commit abc."
    reached = dict(line.strip("| ").split(" | ") for line in lines[2:-2])
    assert reached["at D = 64 at least 1.8 × flash-kmeans' float32 throughput"] == "2.00 ×"
    assert reached["at D = 64 faster than the bare float16 GEMM that writes its N × K result"] == "0.80 ×"
    assert reached["at D = 128 at least 2.3 × flash-kmeans' float32 throughput"] == NOT_YET
    assert reached["256 × 512 × 512 under 10 µs as a graph replay"] == "8.8 µs, 12.3 with L2 flushed"
    assert reached["extra memory within the limit at every shape"] == "1 of 1"
    assert reached["10⁹ rows against float64: 0 wrong"] == "2 of 2,000,000"
    assert (reached["memcheck clean"], reached["racecheck clean"]) == ("clean", NOT_YET)
    assert reached["test MSE ≤ 0.0300 within 60 s of training"] == "12.3 s, 8 epochs --amp"
    assert reached["a training step at least 3 × as fast as plain PyTorch's"] == (
        "2.00 × with the encoder learning, 5.00 × with the encoder resting, "
        "3.00 × for a step alone, its batch on the GPU"
    )


def test_what_was_not_reached_is_said(add: Add) -> None:
    add("search", op="replay", contender="triton", N=256, K=512, D=512, status="failed: it waits")
    add("training", op="run", status="ok", epochs=8, flags="", seconds_to_target=None, test_mse=0.0312)
    table = TABLES["bars"]()
    assert "| failed: it waits |" in table
    assert "| not reached; 0.0312 |" in table


def test_floors_stand_beside_what_was_measured(add: Add) -> None:
    add("search", **searched("triton", 1.25))
    add("search", op="replay", contender="triton", **BAR, status="ok", warm_us=1100.0, cold_us=1200.0)
    row = next(line for line in TABLES["floors"]().splitlines() if line.startswith("| 1,048,576 × 4,096 × 64 "))
    floor = operation_floor_ms((1_048_576, 4_096, 64), H200)
    assert row.endswith(f"| 1.25 | {1.25 / floor:.2f} | 1.2 |")


def test_the_bars_are_held_against_flash_kmeans_at_its_best(add: Add) -> None:
    add("search", **searched("triton", 1.0))
    add("search", **searched("flash-kmeans", 2.5))
    assert "throughput | 2.50 × |" in TABLES["bars"]()
    add("search", **searched("flash-kmeans-norms", 2.25))
    assert "throughput | 2.25 × |" in TABLES["bars"]()


def test_the_figures_of_two_gpus_are_never_mixed(add: Add) -> None:
    h100 = {**HEADER, "gpu": "NVIDIA H100 80GB HBM3"}
    add("search", h100, "h100", **searched("triton", 5.0))
    assert "| 110 |" in readme_table()
    assert "NVIDIA H100 80GB HBM3, driver" in readme_table()
    assert "| copy | 3.35 TB/s |" in TABLES["rates"]()
    add("search", h100, **searched("triton", 2.5))  # copied into another GPU's folder
    assert "| 110 |" in readme_table()
    add("search", **searched("triton", 1.25))
    assert "| 440 |" in readme_table()
    assert "H100" not in readme_table()
    assert "| copy | 4.8 TB/s |" in TABLES["rates"]()


@pytest.mark.parametrize(
    ("gpu", "name"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA GH200 480GB", "gh200"),
     ("NVIDIA A100-SXM4-40GB", "a100"), ("unknown GPU", "unknown-gpu")],
)  # fmt: skip
def test_a_folder_is_named_after_its_gpu(gpu: str, name: str) -> None:
    assert folder_name(gpu) == name


def test_training_is_predicted() -> None:
    lines = {line["model"]: line for line in read_lines(TRAINING_PREDICTIONS)}
    assert list(lines) == ["this library, encoder at rest", "this library, encoder learning", "plain"]
    for line in lines.values():
        assert max(line["operations_ms"], line["bytes_ms"], 4e-3 * line["launches"]) == line["low_ms"]
        assert line["low_ms"] < line["high_ms"]


def test_a_step_is_counted_by_hand() -> None:
    layer = nn.Linear(6, 5, bias=False).requires_grad_(False)
    x = torch.randn(4, 6)
    line = predict_training.predict("layer", lambda: layer(x).square_(), 4)
    assert line["launches"] == 2  # the transposed weight is a view
    assert line["operations_ms"] == pytest.approx(1e-9 * 2 * 4 * 6 * 5 / 67)
    product, square = 4 * (4 * 6 + 6 * 5 + 4 * 5), 4 * 2 * 4 * 5
    assert line["bytes_ms"] == pytest.approx(1e-9 * (product + square) / 4.8)


def test_exactness_counts_only_the_last_sources(add: Add) -> None:
    steps = {"proved": 90, "resolved": 9, "drained": 1, "reference_wrong": 0, "reference_rows": 5}
    sizes = {"K": 8, "D": 4, "dtype": "float32"}
    add("exactness", {**HEADER, "sources": "old"}, part="gaussian", turn=0, rows=100, wrong=7, **steps, **sizes)
    for turn in range(2):
        add("exactness", part="gaussian", turn=turn, rows=100, wrong=0, **steps, **sizes)
    table = TABLES["gpu-exactness"]()
    assert "| gaussian | 8 | 4 | float32 | 200 | 0 | 90.00 % | 9.00 % | 1.00 % |" in table
    assert "In all 0 of 200 wrong; the reference itself: 0 wrong of 10 rows against brute force" in table


def test_the_other_tables_hold_their_lines(add: Add) -> None:
    size = {"N": 256, "K": 512, "D": 512}
    tile = {"usual": "64 x 64", "usual_name": "few_rows", "usual_ms": 0.02, "best": "64 x 32", "best_ms": 0.01}
    add("tiles", op="choice", **size, **tile, ratio=2.0)
    kernels = [{"kernel": f"_{name}_kernel", "launches": 1, "us": us} for name, us in (("rows", 1.0), ("scan", 3.0))]
    add("tiles", op="profile", name="search", **size, launches=2, total_us=4.0, kernels=kernels)
    add("search", op="vector_quantize", contender="cdist + argmin", **size, status="ok", p50_ms=0.5, peak_mib=1234.5)
    add("search", **searched("triton", 1.25))
    add("search", op="memory", **BAR, dtype="float32", data="gaussian", extra_mib=24.5, limit_mib=163.8, within=True)
    add("training", op="run", status="ok", epochs=8, flags="", seconds_to_target=None, test_mse=0.0312, train_s=9.0,
        wall_s=20.0, images_per_s=12345.6, resting_images_per_s=None, learning_images_per_s=11111.1)  # fmt: skip
    add("search", op="replay", contender="gemm", **size, status="failed: no")
    figures = {"Occupancy: Achieved Occupancy [%]": "24.5", "Launch Statistics: Registers Per Thread [register]": "128"}
    add("tiles", op="counters", **size, status="ok", figures=figures)
    add("training", op="loop", images_per_s=3456.7)
    assert "| 256 × 512 × 512 | few_rows: 64 x 64 | 0.02 | 64 x 32 | 0.01 | 2.00 |" in TABLES["tiles"]()
    assert "| search | 2 | 4.0 | _scan_kernel 3.0, _rows_kernel 1.0 |" in TABLES["profiles"]()
    assert "| 256 × 512 × 512 | bare GEMM, float32 | failed: no | failed: no |" in TABLES["replays"]()
    assert "| 256 × 512 × 512 |  |  |  |  |  |  | 24.5 % | 128 register |  |" in TABLES["counters"]()
    assert "| 256 × 512 × 512 | cdist + argmin | 0.5 | 1,234 |" in TABLES["steps"]()
    assert "| 24.5 of 163.8 |" in TABLES["contenders"]()
    assert "| 8 |  | 0.0312 |  | 9.0 | 20.0 | 12,346 |  | 11,111 |" in TABLES["gpu-training"]()
    assert "the plain loop with a DataLoader 3,457 pictures/s" in TABLES["gpu-training"]()


def test_the_plot_is_drawn(add: Add, tmp_path: Path) -> None:
    for code_dim, p50_ms in ((64, 1.0), (128, 2.0)):
        add("search", **{**searched("triton", p50_ms), "D": code_dim})
    tables.plot_throughput(tmp_path / "images" / "plot.png")
    assert (tmp_path / "images" / "plot.png").stat().st_size > 10_000
