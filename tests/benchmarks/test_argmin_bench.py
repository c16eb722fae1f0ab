"""The benchmark of the search, end to end on small shapes, and how it reports contenders that fail."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import argmin_bench
from benchmarks.argmin_bench import CPU_SHAPES, CUDA_SHAPES, parse_shape
from benchmarks.baselines import CONTENDERS, Contender, Search
from benchmarks.search import CLASSES, format_rows

FAST = ("cdist", "addmm", "addmm-chunked", "faiss", "llvm", "llvm-prepared", "torch", "torch-prepared", "gemm")


def bench(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> tuple[int, list[dict[str, object]]]:
    """The exit status and the rows of a run on the CPU."""
    common = ["argmin_bench.py", "--device", "cpu", "--quick", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*common, *arguments])
    status = argmin_bench.main()
    results = out / "results.jsonl"
    return status, [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def replace_search(monkeypatch: pytest.MonkeyPatch, name: str, build: Callable[[Tensor, Tensor], Search]) -> None:
    """Let a contender of that name search by `build`."""
    monkeypatch.setitem(CONTENDERS, name, dataclasses.replace(CONTENDERS[name], build=build))


def test_a_quick_run_fills_every_column(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--shapes", "300x40x8", "500x64x8", "--data", "gaussian", "duplicates", "--contenders", *FAST)
    status, rows = bench(monkeypatch, tmp_path, *arguments)

    assert status == 0
    assert [row["contender"] for row in rows] == list(FAST) * 4
    for row in rows:
        assert row["status"] == "ok"
        assert row["op"] == "nearest_code"
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["tflops"] == pytest.approx(2e-9 * row["N"] * row["K"] * row["D"] / row["p50_ms"])
        assert row["peak_mib"] >= 0
        assert row["timing"] == "wall clock"
        assert all(row[field] for field in ("device", "versions", "commit", "date", "dtype", "data"))
        assert (row["wrong_percent"] is None) == (row["contender"] == "gemm")
        assert (row["uncertified_percent"] is None) == (row["precision"] != "exact")
        if row["contender"] == "cdist":
            assert row["ratio_to_cdist"] == 1
        if row["precision"] == "exact":
            assert row["wrong_percent"] == 0
            assert row["checked_rows"] == row["N"]
    printed = capsys.readouterr().out
    assert "500 x 64 x 8, float32, duplicates" in printed
    assert "llvm-prepared" in printed


def test_small_searches_are_shown_with_their_limits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(argmin_bench._LIMITS, "llvm", (0.0, 9999.0))
    status, rows = bench(monkeypatch, tmp_path, "--small", "--shapes", "1x40x8", "100x40x8")
    assert status == 0
    assert [row["contender"] for row in rows] == ["cdist-gather", "llvm", "llvm-prepared"] * 4
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    shown = {tuple(line[:3]): line[4:] for line in lines if len(line) == 6}
    assert shown["1 x 40 x 8", "offset-3", "llvm"] == ["0.00", "over"]
    assert shown["100 x 40 x 8", "gaussian", "llvm"] == ["9999.00", ""]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str) -> None:
    status, rows = bench(
        monkeypatch, tmp_path, "--shapes", "300x40x8", "--dtype", dtype, "--contenders", "cdist", "addmm", "torch"
    )
    assert status == 0
    assert [row["precision"] for row in rows] == ["float32", "16 bits", "exact"]
    assert {row["dtype"] for row in rows} == {dtype}


def test_a_float32_search_that_is_wrong_says_how_often(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ("--shapes", "500x200x64", "--data", "offset-1000", "--contenders", "cdist", "torch")
    status, (cdist, ours) = bench(monkeypatch, tmp_path, *arguments)
    assert status == 0
    assert cdist["wrong_percent"] > 10
    assert cdist["p50_ms"] > 0
    assert ours["wrong_percent"] == 0


def test_an_exact_search_with_one_wrong_index_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = CONTENDERS["torch"].build

    def build(x: Tensor, codebook: Tensor) -> Search:
        def search() -> Tensor:
            indices = right(x, codebook)()
            indices[7] = (indices[7] + 1) % codebook.shape[0]
            return indices

        return search

    replace_search(monkeypatch, "torch", build)
    status, (cdist, ours) = bench(monkeypatch, tmp_path, "--shapes", "200x40x8", "--contenders", "cdist", "torch")
    assert status == 1
    assert ours["status"] == "WRONG"
    assert ours["wrong_percent"] == pytest.approx(0.5)
    assert ours["p50_ms"] is None
    assert cdist["status"] == "ok"
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (ZeroDivisionError("by zero\nand more"), "failed: by zero"),
        (ZeroDivisionError(), "failed: ZeroDivisionError"),
    ],
)
def test_a_contender_that_fails_is_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, expected: str
) -> None:
    def build(x: Tensor, codebook: Tensor) -> Search:
        raise error

    replace_search(monkeypatch, "addmm", build)
    status, (broken, ours) = bench(monkeypatch, tmp_path, "--shapes", "200x40x8", "--contenders", "addmm", "torch")
    assert status == 0
    assert broken["status"] == expected
    assert broken["p50_ms"] is None
    assert ours["status"] == "ok"


def test_contenders_that_cannot_run_are_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = Contender("absent", "float32", CONTENDERS["cdist"].build, package="no_such_package.of_mine")
    monkeypatch.setitem(CONTENDERS, "absent", absent)
    names = ("absent", "gemm-tf32", "cdist")
    status, rows = bench(monkeypatch, tmp_path, "--shapes", "100x40x8", "--contenders", *names)
    assert status == 0
    statuses = {row["contender"]: row["status"] for row in rows}
    assert statuses["absent"] == "not installed"
    assert statuses["gemm-tf32"] == "runs only on cuda"
    assert "absent (not installed)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "12x3"), "--shapes must be NxKxD with sizes of at least 1, got '12x3'"),
        (("--shapes", "12x0x3"), "got '12x0x3'"),
        (("--contenders", "faster"), "--contenders must be of cdist, "),
        (("--data", "mine"), "--data must be of gaussian, "),
        (("--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--rounds", "-3"), "--rounds must be at least 1, got -3"),
    ],
)
def test_bad_options(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    status, _ = bench(monkeypatch, tmp_path, *arguments)
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "why"), [("file", "File exists"), ("file/below", "Not a directory"), ("taken", "Is a directory")]
)
def test_an_out_that_cannot_be_written_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, why: str
) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "taken" / "results.jsonl").mkdir(parents=True)
    monkeypatch.setattr(argmin_bench, "bench", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["argmin_bench.py", "--device", "cpu", "--out", str(tmp_path / out)])
    assert argmin_bench.main() == 2
    message = f"--out must be a writable folder, got '{tmp_path / out}': {why}"
    assert message in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


def test_an_interruption_keeps_the_shapes_that_are_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make = argmin_bench.make_search_data

    def interrupted(name: str, *shape: int, **settings: object) -> object:
        if shape[0] == 300:
            raise KeyboardInterrupt
        return make(name, *shape, **settings)

    monkeypatch.setattr(argmin_bench, "make_search_data", interrupted)
    arguments = ("--shapes", "100x40x8", "200x40x8", "300x40x8", "--contenders", "cdist", "torch")
    results = tmp_path / "new" / "results.jsonl"
    with pytest.raises(KeyboardInterrupt):
        bench(monkeypatch, results.parent, *arguments)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(row["N"], row["contender"]) for row in rows] == [
        (100, "cdist"), (100, "torch"), (200, "cdist"), (200, "torch"),
    ]  # fmt: skip

    status, rows = bench(monkeypatch, results.parent, *arguments[:2], *arguments[-3:])
    assert status == 0
    assert [row["N"] for row in rows] == [100, 100]  # of this run alone


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["argmin_bench.py", "--device", "cuda"])
    assert argmin_bench.main() == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err


def test_every_default_shape_is_a_shape() -> None:
    assert (65536, 1024, 64) in [parse_shape(text) for text in CPU_SHAPES]
    assert (1048576, 4096, 512) in [parse_shape(text) for text in CUDA_SHAPES]


def row(contender: str, status: str = "ok") -> dict[str, object]:
    measured = {"p50_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0} if status == "ok" else {"p50_ms": None}
    names = ("ratio_to_cdist", "tflops", "peak_mib", "uncertified_percent")
    return {
        "contender": contender, "precision": CONTENDERS[contender].precision, "N": 100, "K": 40, "D": 8,
        "dtype": "float32", "data": "gaussian", "status": status,
        "wrong_percent": None if status == "not installed" else 0.0, **dict.fromkeys(names), **measured,
    }  # fmt: skip


def test_each_class_is_a_section() -> None:
    names = ("cdist", "gemm-bfloat16", "torch", "gemm-tf32", "gemm", "flash-kmeans")
    lines = format_rows([row(name) for name in names]).splitlines()[3:]
    assert [line.split()[1].strip("-") for line in lines] == [
        "cdist", "gemm", "", "torch", "", "gemm-tf32", "flash-kmeans", "", "gemm-bfloat16",
    ]  # fmt: skip
    assert {*CLASSES} == {contender.precision for contender in CONTENDERS.values()}


@pytest.mark.parametrize("absent", ["cdist", "torch", "gemm-bfloat16"])
def test_what_did_not_run_leaves_no_empty_section(absent: str) -> None:
    names = ("cdist", "torch", "gemm-bfloat16")
    text = format_rows([row(name, status="not installed" if name == absent else "ok") for name in names])
    assert sum("| ---" in line for line in text.splitlines()) == 2
    assert text.splitlines()[-1] == f"not run: {absent} (not installed)"


def test_a_wrong_contender_is_in_its_class() -> None:
    text = format_rows([row("torch", status="WRONG"), row("gemm-tf32"), row("cdist")])
    assert text.index("cdist") < text.index("WRONG") < text.index("gemm-tf32")
