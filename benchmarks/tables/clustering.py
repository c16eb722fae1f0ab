"""The tables of k-means, residual and product quantization, and semantic IDs."""

from collections.abc import Iterator, Sequence

from benchmarks.results import Row, markdown
from benchmarks.tables.rows import NO_RESULTS, cpu_rows, size_of, spread, where


def semantic_ids_table() -> str:
    """Residual codes of this library, faiss and scikit-learn: error of each level, collisions and time."""
    rows = cpu_rows("semantic_ids")
    if not rows:
        return NO_RESULTS
    settings = rows[-1]["settings"]
    rows = [row for row in rows if row["settings"] == settings]
    levels = range(settings["num_levels"])
    cells = [["by", *(f"error after {level + 1}" for level in levels), "collisions", "CPU seconds"]]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        errors = [spread([row["errors"][level] for row in own], 4) for level in levels]
        counts = [spread([row[name] for row in own], digits) for name, digits in (("collisions", 0), ("seconds", 1))]
        cells.append([method.replace("vq_kernels", "this library"), *errors, *counts])
    items = f"{settings['num_items']:,} synthetic items of {settings['code_dim']} dimensions"
    what = f"{items}, {settings['num_codes']} codes per level"
    return f"{markdown(cells)}\n\nMean ± standard deviation over {len(own)} draws; {what}; {where(rows)}."


def kmeans_table(rows: Sequence[Row]) -> str:
    """k-means beside faiss and scikit-learn: a line for each data set and contender of clustering.py."""
    cells = [["data", "by", "inertia / scikit-learn's", "time / faiss'", "iterations"]]
    for data, contender, runs in _contenders(rows, "k-means"):
        inertia, seconds = _relative(rows, runs, "inertia", "scikit-learn"), _relative(rows, runs, "seconds", "faiss")
        iterations = [row["iterations"] for row in runs]
        cells.append([data, contender, spread(inertia, 4), spread(seconds, 2), spread(iterations, 0)])
    data_sets = "mixture: 1,000 Gaussian clusters; spectrum: one Gaussian with variances 1, 1/2, 1/3 and so on"
    defaults = "faiss makes 25 iterations and trains on at most 256 rows per centroid; scikit-learn has n_init = 1"
    return _clustering(cells, rows, "k-means", f"{data_sets}. Default settings: {defaults}")


def residual_table(rows: Sequence[Row]) -> str:
    """Residual quantization: a line for each contender of clustering.py."""
    cells: list[list[str]] = []
    for _, contender, runs in _contenders(rows, "residual"):
        by_stage = [spread(errors, 4) for errors in zip(*(row["errors"] for row in runs), strict=True)]
        seconds = spread(_relative(rows, runs, "seconds", "faiss, greedy"), 2)
        cells = cells or [["by", *(f"stage {q + 1}" for q in range(len(by_stage))), "time / faiss greedy"]]
        cells.append([contender, *by_stage, seconds])
    what = "The share of the variance that is left after each stage; unit vectors around 500 topics"
    others = "faiss, beam: max_beam_size = 5, its default; greedy: 1. scikit-learn: KMeans (n_init = 1) stage by stage"
    return _clustering(cells, rows, "residual", f"{what}. {others}")


def product_table(rows: Sequence[Row]) -> str:
    """Product quantization: a line for each contender of clustering.py."""
    cells = [["by", "recall@10", "share of the variance left", "time / faiss'"]]
    for _, contender, runs in _contenders(rows, "product"):
        recall, error = (spread([row[name] for row in runs], 4) for name in ("recall", "error"))
        cells.append([contender, recall, error, spread(_relative(rows, runs, "seconds", "faiss"), 2)])
    what = "Unit vectors around 500 topics, in 8 parts of 8 dimensions, and 1,000 queries"
    how = "All train on the N rows, which are as many as faiss takes (256 per centroid); faiss searches in all codes"
    return _clustering(cells, rows, "product", f"{what}. {how}")


def _contenders(rows: Sequence[Row], op: str) -> Iterator[tuple[str, str, list[Row]]]:
    """Yields data set, contender and the rows of its seeds."""
    own = [row for row in rows if row["op"] == op]
    for data, contender in dict.fromkeys((row["data"], row["contender"]) for row in own):
        yield data, contender, [row for row in own if (row["data"], row["contender"]) == (data, contender)]


def _relative(rows: Sequence[Row], runs: Sequence[Row], name: str, contender: str) -> list[float]:
    """A figure of the runs, divided by that of another contender with the same data and seed."""
    by_seed = {
        (row["op"], row["data"], row["seed"]): row[name]
        for row in rows
        if row["contender"] == contender and name in row
    }
    return [row[name] / by_seed[row["op"], row["data"], row["seed"]] for row in runs]


def _clustering(cells: list[list[str]], rows: Sequence[Row], op: str, what: str) -> str:
    own = [row for row in rows if row["op"] == op]
    if not own:
        return NO_RESULTS
    how = f"{own[0]['timing']}; mean ± standard deviation over {len({row['seed'] for row in own})} seeds"
    command = f"`python benchmarks/clustering.py --threads {own[0]['threads']}`"
    return f"{markdown(cells)}\n\nN × K × D = {size_of(own[0])}. {what}. {how}; {where(own)}; {command}."
