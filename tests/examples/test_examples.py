"""The examples run unchanged and print what they promise."""

import re
import runpy
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.results import read_rows
from benchmarks.tables.learning import codec_table, vqvae_table
from tests.vqae import conftest
from vq_kernels import ResidualVectorQuantizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

images = conftest.images  # a fixture


def run(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    started = time.process_time()
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert time.process_time() - started < 60  # CPU time
    return capsys.readouterr().out


def test_every_example_is_tested() -> None:
    tested = {"conv_vqvae.py", "kmeans.py", "residual_signal.py", "semantic_ids.py", "swap_quantizer.py"}
    assert {file.name for file in EXAMPLES.glob("*.py")} == tested


def test_the_vqvae_records_each_method(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, images: Path, tmp_path: Path
) -> None:
    methods = ["VectorQuantizer(512, 64)", "CVQ"]
    data = ["--dataset", "imagefolder", "--data-dir", str(images)]
    options = ["--steps", "2", "--batch-size", "8", "--out", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr(sys, "argv", ["conv_vqvae.py", *data, *options, "--methods", *methods])
    printed = run("conv_vqvae.py", capsys).splitlines()
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row["method"] for row in rows] == methods
    assert rows[0]["time"] == 1
    for row, line in zip(rows, printed, strict=True):
        assert (row["seed"], row["steps"], row["batch_size"], row["dataset"]) == (0, 2, 8, "imagefolder")
        assert f"MSE {row['mse']:.5f}  perplexity {row['perplexity']:3.0f}" in line
        assert 0.01 < row["mse"] < 1
        assert 1 < row["perplexity"] <= 512
    assert vqvae_table(rows).count("\n|") == 3


def test_every_quantizer_of_the_vqvae_gives_its_input_a_gradient() -> None:
    for name, make in runpy.run_path(str(EXAMPLES / "conv_vqvae.py"))["METHODS"].items():
        x = torch.randn(2, 64, 4, 4, requires_grad=True)
        quantized, indices, loss = make()(x)
        (quantized.sum() + loss.sum()).backward()
        assert quantized.shape == x.shape, name
        assert indices.shape == (2, 4, 4), name
        assert x.grad is not None, name
        assert x.grad.any(), name


def test_kmeans_starts_better_with_plus_plus(capsys: pytest.CaptureFixture[str]) -> None:
    random, plus_plus = (float(error) for error in re.findall(r"distance +([\d.]+)", run("kmeans.py", capsys)))
    assert 15.5 < plus_plus < random / 4


def test_the_codec_decodes_better_with_every_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ["--steps", "100", "--batch-size", "8", "--out", str(tmp_path / "rows.jsonl"), "--methods"]
    methods = ["ResidualVectorQuantizer(6, 256, 32)", "vector-quantize-pytorch: k-means, averages, resets"]
    monkeypatch.setattr(sys, "argv", ["residual_signal.py", *options, *methods])
    printed = run("residual_signal.py", capsys)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row["method"] for row in rows] == methods
    ours, theirs = (row["decibels"] for row in rows)
    assert ", ".join(f"{each:.2f}" for each in ours) in printed
    assert all(later > earlier for earlier, later in pairwise(ours))
    assert ours[-1] > theirs[-1]
    assert codec_table(rows).count("\n|") == 3


def test_the_new_quantizer_is_better(capsys: pytest.CaptureFixture[str]) -> None:
    found = re.findall(r"error ([\d.]+), (\d+) of 256", run("swap_quantizer.py", capsys))
    (error_before, codes_before), (error_after, codes_after) = ((float(error), int(codes)) for error, codes in found)
    assert error_after < 0.7 * error_before
    assert codes_after > 200 > codes_before


def run_semantic_ids(*arguments: str | Path) -> str:
    """Runs the example in a process of its own, because it chooses Triton's interpreter before Triton is imported."""
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", EXAMPLES / "semantic_ids.py"]
    finished = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_no_semantic_id_changes(tmp_path: Path) -> None:
    embeddings = np.random.default_rng(0).standard_normal((1300, 8), dtype=np.float32)
    np.save(tmp_path / "items.npy", embeddings)
    options = ("--num-codes", "8", "--num-levels", "2", "--out", tmp_path / "out")
    printed = run_semantic_ids("--embeddings", tmp_path / "items.npy", *options)
    checks = re.findall(r"(\d+) of (\d+) IDs change: (.*)", printed)
    assert {changed for changed, _, _ in checks} == {"0"}
    assert [int(count) for _, count, _ in checks] == [256, 1300, 1300, 1300, 1300, 1300, 1300, 256]
    assert [way for _, _, way in checks][-2:] == ["saved and loaded", "Triton backend, interpreted"]
    assert re.findall(r"(\S+): share of the variance lost 0.\d+, 0.\d+;", printed) == [
        "vq_kernels",
        "faiss",
        "scikit-learn",
    ]
    assert f"{1300} items, {1300} different IDs" in printed

    ids = np.load(tmp_path / "out" / "semantic_ids.npy")
    assert ids.shape == (1300, 3)
    assert len(np.unique(ids, axis=0)) == 1300
    assert len(np.unique(ids[:, :2], axis=0)) <= 64
    codebook = torch.load(tmp_path / "out" / "codebook.pt")
    quantizer = ResidualVectorQuantizer.from_codebook(codebook, freeze=True)
    assert torch.equal(quantizer.encode(torch.from_numpy(embeddings)), torch.from_numpy(ids[:, :2]))


def test_the_last_index_counts_the_items_before() -> None:
    names = runpy.run_path(str(EXAMPLES / "semantic_ids.py"))
    indices = torch.tensor([[1, 2], [0, 0], [1, 2], [1, 1], [1, 2], [0, 0]])
    unique = names["with_last_index"](indices)
    assert torch.equal(unique[:, :2], indices)
    assert unique[:, 2].tolist() == [0, 0, 1, 0, 2, 1]
    assert torch.equal(names["with_last_index"](indices[:4]), unique[:4])
