"""The tables of trained models."""

import itertools
import math
import statistics
from collections.abc import Sequence

from benchmarks.results import Row, markdown
from benchmarks.tables.rows import NO_RESULTS, cpu_rows, spread, where

METHODS = {"kmeans": "K-means", "model": "model"}  # of a rate_distortion.py row, as tables show them
_ABLATION_COLUMNS = (  # heading, entry, digits after the point
    ("train MSE", "train_mse", 5),
    ("validation MSE", "val_mse", 5),
    ("test MSE", "test_mse", 5),
    ("codes used", "codes_used", 0),
    ("perplexity", "perplexity", 0),
)


def over_seeds(rows: Sequence[Row], method: str, num_codes: int, name: str, num_quantizers: int = 1) -> list[float]:
    """A figure of one method at one K and Q, for each seed. Exits if the rows differ in their settings."""
    sizes = (num_quantizers, num_codes)
    runs = [row for row in rows if row["method"] == method and (row["num_quantizers"], row["num_codes"]) == sizes]
    if any(run["settings"] != runs[0]["settings"] for run in runs):
        raise SystemExit(f"the results of {METHODS[method]} at K = {num_codes} differ in their settings: repeat some")
    return [run[name] for run in runs]


def model_table() -> str:
    """What the autoencoder reaches."""
    rows = cpu_rows("rate_distortion")
    names = ("test_mse", "test_codes_used", "test_perplexity")
    mse, codes_used, perplexity = (over_seeds(rows, "model", 512, name) for name in names)
    bound = over_seeds(rows, "kmeans", 512, "test_mse")
    first = next(row for row in rows if (row["method"], row["num_codes"]) == ("model", 512))
    settings, bench, soak = first["settings"], cpu_rows("train_bench")[-1], cpu_rows("exactness")[-1]
    psnr = f"{-10 * math.log10(statistics.fmean(mse)):.2f} dB"
    cells = [
        ("", "measured"),
        ("Indices that differ from float64 brute force", f"{soak['wrong']} of {soak['rows']:,}"),
        ("Test MSE per pixel value (pixels in [0, 1]), K = 512", f"{spread(mse, 5)} ({psnr})"),
        ("K-means of the pixels, on the same images", spread(bound, 5)),
        ("Codes used on the test images", f"{spread(codes_used, 0)} of 512, perplexity {spread(perplexity, 0)}"),
        ("Training time, start to exit", f"{settings['max_minutes']:g} minutes"),
        ("Images per second, relative to a bare loop without quantizer or data", f"{bench['ratio']:.2f}"),
    ]
    images = f"{first['num_train']:,} training images (2 % of them held out) and {first['num_test']:,} test images"
    what = f"CIFAR-10 (JPEG copy), {images}; mean ± standard deviation over {len(mse)} seeds"
    length = f"--max-minutes {settings['max_minutes']:g} --epochs {settings['epochs']}{_freezing([first])}"
    command = f"python -m vqae.train --dataset imagefolder --data-dir DIR {length}"
    others = f"Brute force: {soak['device']}, {soak['date']}. Bare loop: {bench['device']}, {bench['date']}"
    where = f"{first['device']}; {first['versions']}; {first['date']}"
    return f"{markdown(cells)}\n\n{what}; {where}; `{command}`. {others}."


def _freezing(rows: Sequence[Row]) -> str:
    """The flags by which these runs froze the encoder at first, each after a space."""
    runs = (row["settings"].get("unfreeze_encoder_at", 0.0) for row in rows if row["method"] == "model")
    return "".join(f" --unfreeze-encoder-at {value}" for value in sorted({*runs} - {0.0}))


def _model_runs(rows: Sequence[Row]) -> str:
    """`_where`, and which models were trained with an encoder that was frozen at first."""
    frozen = [row for row in rows if row["method"] == "model" and _freezing([row])]
    sizes = ", ".join(f"{num_codes:,}" for num_codes in sorted({row["num_codes"] for row in frozen}))
    return f"{where(rows)}; the model of K = {sizes} with `{_freezing(frozen).strip()}`" if frozen else where(rows)


def ablation_table(rows: Sequence[Row]) -> str:
    """One line per variant. Exits if two rows differ in a setting that neither's variant overrides."""
    if not rows:
        return NO_RESULTS
    _check_comparable(rows)
    cells = [["variant", "seeds", *(heading for heading, _, _ in _ABLATION_COLUMNS)]]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        runs = [row for row in rows if row["variant"] == variant]
        finished = [row for row in runs if not row["diverged"]]
        lost = f", {len(runs) - len(finished)} diverged" if len(finished) < len(runs) else ""
        line = [variant, f"{len(runs)}{lost}"]
        for _, name, digits in _ABLATION_COLUMNS:
            values = [row[name] for row in finished if name in row]
            line.append(spread(values, digits) or "-")
        cells.append(line)
    settings = rows[0]["settings"]
    images = "all training images" if settings["limit"] is None else f"{settings['limit']:,} training images"
    what = f"K = {settings['num_codes']}, {settings['epochs']} epochs of {images} ({settings['dataset']})"
    return f"{markdown(cells)}\n\nMean ± standard deviation over the seeds; {what}; {where(rows)}."


def _check_comparable(rows: Sequence[Row]) -> None:
    for first, row in itertools.combinations(rows, 2):
        overridden = {} if first["variant"] == row["variant"] else {**first["overrides"], **row["overrides"]}
        for name in {**first["settings"], **row["settings"]}:
            if name not in overridden and first["settings"].get(name) != row["settings"].get(name):
                raise SystemExit(
                    f"ablation.jsonl: {row['variant']!r} and {first['variant']!r} differ in {name}: repeat one"
                )


def rate_distortion_table(rows: Sequence[Row]) -> str:
    """The model compared with k-means of the pixels. Perplexity and codes used are those on the test images."""
    if not rows:
        return NO_RESULTS
    return f"{markdown(rate_distortion_cells(rows))}\n\nMean ± standard deviation over the seeds; {_model_runs(rows)}."


def rate_distortion_cells(rows: Sequence[Row]) -> list[list[str]]:
    """The cells of that table: headings, then a line for each K, Q and method.

    Bits are those of an image, Q·log2 K. Ratios are the model's over k-means'.
    """
    cells = [["K", "bits", "by", "train MSE", "test MSE", "train ratio", "test ratio", "perplexity", "codes used"]]
    for sizes in sorted({(row["num_quantizers"], row["num_codes"]) for row in rows}):

        def figures(method: str, *names: str, sizes: tuple[int, int] = sizes) -> list[list[float]]:
            return [over_seeds(rows, method, sizes[1], name, sizes[0]) for name in names]

        bounds = figures("kmeans", "train_mse", "test_mse")
        for method, shown in METHODS.items():
            mse = figures(method, "train_mse", "test_mse")
            codes = figures(method, "test_perplexity", "test_codes_used")
            ratios = [
                f"{statistics.fmean(found) / statistics.fmean(bound):.3f}"
                if found and bound and method == "model"
                else ""
                for found, bound in zip(mse, bounds, strict=True)
            ]
            line = [*(spread(found, 5) for found in mse), *ratios, *(spread(found, 0) for found in codes)]
            if any(line):
                size = f"{sizes[0]} × {sizes[1]:,}" if sizes[0] > 1 else f"{sizes[1]:,}"
                cells.append([size, f"{sizes[0] * math.log2(sizes[1]):.3g}", shown, *line])
    return cells


def vqvae_table(rows: Sequence[Row]) -> str:
    """A line for each quantizer in the convolutional VQ-VAE, over its seeds, with use and time of the longest runs.

    "Relative" is the error divided by that of the first line with the same seed and length.
    """
    if not rows:
        return NO_RESULTS
    lengths = sorted({row["steps"] for row in rows})
    errors = [heading for steps in lengths for heading in (f"MSE, {steps} steps", "relative")]
    lines: list[Sequence[object]] = [("quantizer", "seeds", *errors, "perplexity", "CPU time")]
    of_first = {(row["seed"], row["steps"]): row["mse"] for row in rows if row["method"] == rows[0]["method"]}
    for method in dict.fromkeys(row["method"] for row in rows):
        figures = []
        for steps in lengths:
            runs = [row for row in rows if (row["method"], row["steps"]) == (method, steps)]
            relative = [run["mse"] / of_first[run["seed"], steps] for run in runs if (run["seed"], steps) in of_first]
            figures += [spread([run["mse"] for run in runs], 5), spread(relative, 2)]
        times = [run["time"] for run in runs if "time" in run]  # left out where it was not measured
        lines.append((method, len(runs), *figures, spread([run["perplexity"] for run in runs], 0), spread(times, 2)))
    settings = {f"batches of {row['batch_size']} images ({row['dataset']})" for row in rows}
    command = "python examples/conv_vqvae.py --data-dir DIR --seeds 0 1 2 --steps"
    commands = (f"`{command} {steps}`: {where([row for row in rows if row['steps'] == steps])}" for steps in lengths)
    return f"{markdown(lines)}\n\nAdam, {'; '.join(sorted(settings))}; K = 512, D = 64. {'. '.join(commands)}."


def codec_table(rows: Sequence[Row]) -> str:
    """A line for each residual quantizer in the audio codec: the error of each stage, in decibels, over its seeds."""
    if not rows:
        return NO_RESULTS
    stages = range(len(rows[0]["decibels"]))
    lines: list[Sequence[object]] = [("quantizer", *(f"stage {stage + 1}" for stage in stages), "CPU time")]
    for method in dict.fromkeys(row["method"] for row in rows):
        runs = [row for row in rows if row["method"] == method]
        decibels = (spread([run["decibels"][stage] for run in runs], 2) for stage in stages)
        lines.append((method, *decibels, spread([run["time"] for run in runs], 2)))
    settings = {f"{row['steps']} steps of Adam, batches of {row['batch_size']} clips" for row in rows}
    size = f"K = 256, D = 32; mean ± standard deviation over {len({row['seed'] for row in rows})} seeds"
    return f"{markdown(lines)}\n\n{'; '.join(sorted(settings))}; {size}; {where(rows)}."


PUBLISHED: dict[str, tuple[dict[int, float], float]] = {  # error by step, and use after 2,000 steps, to 4 digits
    "VQ, SGD": ({1: 9.021, 100: 3.139, 500: 2.536, 1000: 2.320, 2000: 2.119}, 0.0651),
    "EMA": ({1: 3.508, 100: 2.204, 500: 1.585, 1000: 1.570, 2000: 1.543}, 0.1404),
    "SimVQ": ({1: 9.535, 100: 1.593, 500: 1.412, 1000: 1.052, 2000: 1.055}, 0.9935),
    "CVQ": ({1: 6.085, 100: 1.575, 500: 1.229, 1000: 1.139, 2000: 1.060}, 0.7997),
    "Wasserstein VQ": ({1: 7.434, 100: 2.549, 500: 1.042, 1000: 1.014, 2000: 0.991}, 0.9976),
}  # Fang et al. 2025, arXiv:2506.15078: the results in their repository, Gaussian rows of mean 2


def gaussian_table(rows: Sequence[Row]) -> str:
    """Codebooks of Gaussian rows: the error by training step, beside the published ones."""
    if not rows:
        return NO_RESULTS
    steps = (1, 10, 100, 500, 1000, 2000)
    cells = [["method", "by", *(f"{step:,}" for step in steps), "codes used"]]
    for method in dict.fromkeys([*(row["method"] for row in rows), *PUBLISHED]):
        own = [row for row in rows if row["method"] == method]
        if own:
            errors = [spread([row["error"] for row in own if row["step"] == step], 3) for step in steps]
            used = statistics.fmean(row["use"] for row in own if row["step"] == max(row["step"] for row in own))
            cells.append([method, "this library", *errors, f"{used:.1%}"])
        if method in PUBLISHED:
            published, used = PUBLISHED[method]
            errors = [f"{published[step]:.3f}" if step in published else "" for step in steps]
            cells.append([method, "published", *errors, f"{used:.1%}"])
    settings = rows[0]["settings"]
    size = f"K = {settings['num_codes']:,}, D = {settings['code_dim']}, {settings['num_rows']:,} rows per step"
    what = f"Error after so many steps, and use after the last one, on {settings['num_evaluated']:,} new rows; {size}"
    return f"{markdown(cells)}\n\n{what}; {where(rows)}; `python benchmarks/gaussian_codes.py`."


def use_table(rows: Sequence[Row]) -> str:
    """How many codes the model uses: a line for each K and batch size of rate_distortion.py rows."""
    if not rows:
        return NO_RESULTS
    cells = [["K", "batch size", "test MSE", "perplexity", "codes used on test images", "on training images"]]
    for row in sorted(rows, key=lambda row: (row["num_codes"], row["settings"]["batch_size"])):
        sizes = (f"{row['num_codes']:,}", f"{row['settings']['batch_size']:,}")
        used = (f"{row[f'{split}_codes_used']:,}" for split in ("test", "train"))
        cells.append([*sizes, f"{row['test_mse']:.5f}", f"{row['test_perplexity']:.0f}", *used])
    epochs = {row["settings"]["epochs"] for row in rows}
    length = " and ".join(f"{count} epoch{'s' * (count > 1)}" for count in sorted(epochs))
    images = f"{length} of {rows[0]['num_train']:,} training images, {rows[0]['num_test']:,} test images"
    return f"{markdown(cells)}\n\nOne seed; {images}; {where(rows)}."
