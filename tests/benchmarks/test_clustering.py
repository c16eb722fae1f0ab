"""The comparison of k-means, residual and product quantization, at a small size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import clustering
from benchmarks.clustering import Options
from benchmarks.results import Row, read_rows
from benchmarks.tables.clustering import kmeans_table, product_table, residual_table
from benchmarks.tables.rows import NO_RESULTS

pytest.importorskip("faiss")

SMALL: dict[str, Any] = {
    **{"num_rows": 1500, "num_clusters": 20, "row_dim": 4, "num_embeddings": 800, "embedding_dim": 8, "bits": 4},
    **{"num_stages": 2, "num_parts": 4, "num_queries": 30, "seeds": 1},
}


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    out = tmp_path_factory.mktemp("results") / "clustering.jsonl"
    assert clustering.main(Options(**{**SMALL, "seeds": 2}, out=out)) == 0
    return read_rows(out)


def test_every_contender_has_a_row_for_each_task_and_seed(rows: list[Row]) -> None:
    found = [(row["op"], row["data"], row["contender"]) for row in rows if row["seed"] == 1]
    assert found == [
        *(("k-means", data, by) for data in ("mixture", "spectrum") for by in ("ours", "faiss", "scikit-learn")),
        *(("residual", "embeddings", by) for by in ("ours", "faiss, greedy", "faiss, beam", "scikit-learn")),
        *(("product", "embeddings", by) for by in ("ours", "ours, tolerance=0.003", "faiss")),
    ]
    assert len(rows) == 2 * len(found)
    assert all(row["status"] == "ok" and row["seconds"] > 0 for row in rows)
    assert all("scikit-learn 1." in row["versions"] and row["threads"] == 1 for row in rows)


def test_contenders_reach_about_the_same(rows: list[Row]) -> None:
    for op, data, figure in (
        ("k-means", "mixture", "inertia"), ("k-means", "spectrum", "inertia"), ("product", "embeddings", "error"),
    ):  # fmt: skip
        figures = [row[figure] for row in rows if (row["op"], row["data"], row["seed"]) == (op, data, 0)]
        assert max(figures) < 1.15 * min(figures)
    for row in rows:
        if row["op"] == "residual":
            assert 1 > row["errors"][0] > row["errors"][1] > 0
        if row["op"] == "product":
            assert 0.3 < row["recall"] < 1


@pytest.mark.parametrize("op", clustering.OPS)
def test_a_wrong_index_is_not_timed(
    op: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shifted = {"k-means": "nearest_code", "residual": "ResidualVectorQuantizer", "product": "to_faiss"}[op]
    original = getattr(clustering, shifted)

    class Wrong(torch.nn.Module):
        def __init__(self, *sizes: int) -> None:
            super().__init__()
            self.inner = original(*sizes)
            self.fit, self.codebook = self.inner.fit, self.inner.codebook

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner.encode(x) ^ 1

    if op == "residual":
        monkeypatch.setattr(clustering, shifted, Wrong)
    elif op == "product":
        monkeypatch.setattr(clustering, shifted, lambda quantizer, indices: original(quantizer, indices ^ 1))
    else:
        shift = lambda x, codebook: original(x, codebook)._replace(indices=original(x, codebook).indices ^ 1)  # noqa: E731
        monkeypatch.setattr(clustering, shifted, shift)
    assert clustering.main(Options(**SMALL, ops=(op,))) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wrong = [line for line in lines if line["status"] == "WRONG"]
    assert {line["contender"] for line in wrong} >= {"ours"}
    assert all("seconds" not in line for line in wrong)


def test_the_data_depend_on_the_seed() -> None:
    for draw in (clustering.mixture, clustering.spectrum, clustering.embeddings):
        assert torch.equal(draw(50, 4, 1), draw(50, 4, 1))
        assert not torch.equal(draw(50, 4, 1), draw(50, 4, 2))


def test_tables(rows: list[Row]) -> None:
    tables = {"k-means": kmeans_table(rows), "residual": residual_table(rows), "product": product_table(rows)}
    lines = {op: table.splitlines() for op, table in tables.items()}
    assert "| mixture | scikit-learn | 1.0000 ± 0.0000 |" in tables["k-means"]
    assert "| spectrum | faiss |" in tables["k-means"]
    assert [len(table) for table in lines.values()] == [2 + 6 + 2, 2 + 4 + 2, 2 + 3 + 2]
    assert lines["residual"][0] == "| by | stage 1 | stage 2 | time / faiss greedy |"
    assert lines["product"][4].startswith("| faiss | 0.")
    assert lines["product"][4].endswith("| 1.00 ± 0.00 |")
    assert lines["product"][-1].startswith("N × K × D = 800 × 16 × 8. ")
    ours = [row["errors"][1] for row in rows if (row["op"], row["contender"]) == ("residual", "ours")]
    assert f" {sum(ours) / 2:.4f} ± " in lines["residual"][2]
    assert kmeans_table([]) == residual_table([]) == product_table([]) == NO_RESULTS
