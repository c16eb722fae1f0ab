"""The tables of what was learned, from the lines of recipe_ablation.py and of rate_distortion.py.

It needs the standard library alone.
"""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

METHODS = {"kmeans": "K-means", "model": "model"}
"""How the methods of a rate_distortion.py line are shown."""

_MSE = ("train_mse", "test_mse")
_NONE_YET = "No results are committed yet."
_ABLATION_COLUMNS = (  # heading, entry, digits after the point
    ("train MSE", "train_mse", 5),
    ("validation MSE", "val_mse", 5),
    ("test MSE", "test_mse", 5),
    ("codes used", "codes_used", 0),
    ("perplexity", "perplexity", 0),
)


class Spread(NamedTuple):
    """A figure over several seeds.

    Attributes:
        mean: over the seeds.
        deviation: the standard deviation of a sample; 0 of a single seed.
        seeds: how many.
    """

    mean: float
    deviation: float
    seeds: int

    def text(self, digits: int) -> str:
        """Mean ± deviation; the mean alone of a single seed."""
        mean = f"{self.mean:.{digits}f}"
        return f"{mean} ± {self.deviation:.{digits}f}" if self.seeds > 1 else mean


def spread(values: Sequence[float]) -> Spread:
    """Mean and deviation of at least one value."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


def ablation_table(lines: Sequence[dict[str, Any]]) -> str:
    """The variants in the order of their first lines: the figures of each, as mean ± deviation over its seeds.

    Raises:
        SystemExit: two lines differ in a setting that neither's variant overrides, or two of one variant in any.
    """
    if not lines:
        return _NONE_YET
    _check_comparable(lines)
    rows = [["variant", "seeds", *(heading for heading, _, _ in _ABLATION_COLUMNS)]]
    for variant in dict.fromkeys(line["variant"] for line in lines):
        runs = [line for line in lines if line["variant"] == variant]
        finished = [line for line in runs if not line["diverged"]]
        lost = f", {len(runs) - len(finished)} diverged" if len(finished) < len(runs) else ""
        row = [variant, f"{len(runs)}{lost}"]
        for _, name, digits in _ABLATION_COLUMNS:
            values = [line[name] for line in finished if name in line]
            row.append(spread(values).text(digits) if values else "-")
        rows.append(row)
    settings = lines[0]["settings"]
    pictures = "all training pictures" if settings["limit"] is None else f"{settings['limit']:,} training pictures"
    what = f"K = {settings['num_codes']}, {settings['epochs']} epochs of {pictures} ({settings['dataset']})"
    return f"{_markdown(rows)}\n\nMean ± standard deviation over the seeds; {what}; {_where(lines)}."


def rate_distortion_table(lines: Sequence[dict[str, Any]]) -> str:
    """The model beside K-means of the pixels; perplexity and codes used are those on the test pictures."""
    if not lines:
        return _NONE_YET
    return f"{_markdown(rate_distortion_rows(lines))}\n\nMean ± standard deviation over the seeds; {_where(lines)}."


def rate_distortion_rows(lines: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The cells of the table, a row for each K and method, after one of headings.

    The ratios stand in the model's row: its mean over that of K-means.
    """
    headings = ["K", "by", "train MSE", "test MSE", "train ratio", "test ratio", "perplexity", "codes used"]
    rows = [headings]
    for num_codes in sorted({line["num_codes"] for line in lines}):
        bounds = [over_seeds(lines, "kmeans", num_codes, name) for name in _MSE]
        for method, shown in METHODS.items():
            mse = [over_seeds(lines, method, num_codes, name) for name in _MSE]
            codes = [over_seeds(lines, method, num_codes, name) for name in ("test_perplexity", "test_codes_used")]
            ratios = [
                f"{found.mean / bound.mean:.3f}" if found and bound and method == "model" else ""
                for found, bound in zip(mse, bounds, strict=True)
            ]
            cells = [*(_cell(found, 5) for found in mse), *ratios, *(_cell(found, 0) for found in codes)]
            if any(cells):
                rows.append([f"{num_codes:,}", shown, *cells])
    return rows


def use_table(lines: Sequence[dict[str, Any]]) -> str:
    """The model's codes in use, a row for each K, batch size, D and length of run; lines of rate_distortion.py."""
    runs = [line for line in lines if line["method"] == "model"]
    if not runs:
        return _NONE_YET
    rows = [["K", "batch size", "D", "minutes", "seeds", "test MSE", "codes used, fewest", "perplexity on test, least"]]
    kinds = {_kind(line) for line in runs}
    for num_codes in sorted({line["num_codes"] for line in runs}):
        for kind in sorted(kinds, key=str):
            alike = [line for line in runs if line["num_codes"] == num_codes and _kind(line) == kind]
            if alike:
                sizes = [f"{size:,}" if size is not None else "-" for size in (num_codes, *kind)]
                mse = spread([line["test_mse"] for line in alike]).text(5)
                fewest = [f"{min(line[f'test_{name}'] for line in alike):.0f}" for name in ("codes_used", "perplexity")]
                rows.append([*sizes, str(len(alike)), mse, *fewest])
    return f"{_markdown(rows)}\n\n{_where(runs)}."


def _kind(line: dict[str, Any]) -> tuple[Any, ...]:
    """What runs of one K may differ in."""
    return tuple(line["settings"][name] for name in ("batch_size", "code_dim", "max_minutes"))


def over_seeds(lines: Sequence[dict[str, Any]], method: str, num_codes: int, name: str) -> Spread | None:
    """A figure of one method at one K; None where there is no line. Exits where these differ in their settings."""
    runs = [line for line in lines if (line["method"], line["num_codes"]) == (method, num_codes)]
    if any(run["settings"] != runs[0]["settings"] for run in runs):
        raise SystemExit(f"the results of {METHODS[method]} at K = {num_codes} differ in their settings: do some anew")
    return spread([run[name] for run in runs]) if runs else None


def _cell(found: Spread | None, digits: int) -> str:
    return "" if found is None else found.text(digits)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row holds the headings."""
    first, *others = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([first, "|---" * len(rows[0]) + "|", *others])


def _check_comparable(lines: Sequence[dict[str, Any]]) -> None:
    """Exit if two lines differ in a setting that neither's variant overrides, or two of one variant in any."""
    for first, line in itertools.combinations(lines, 2):
        alike = first["variant"] == line["variant"]
        overridden = {} if alike else {**first["overrides"], **line["overrides"]}
        for name in {**first["settings"], **line["settings"]}:
            if name not in overridden and first["settings"].get(name) != line["settings"].get(name):
                raise SystemExit(
                    f"ablation.jsonl: {line['variant']!r} and {first['variant']!r} differ in {name}: do one anew"
                )


def _where(lines: Sequence[dict[str, Any]]) -> str:
    """Devices, versions and dates of the lines, each only once."""
    return "; ".join(", ".join(sorted({line[name] for line in lines})) for name in ("device", "versions", "date"))
