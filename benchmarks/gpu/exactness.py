"""Stage "exactness": 10^9 rows of all kinds against a float64 reference on the GPU. Not one index may differ.

Each part of `exactness_data.PARTS` is done in turns, all parts once before any is done twice, so that a run that is cut
short has done some of each; a line is written after every turn. It counts the wrong indices (the contract of
`search_verification.wrong_rows`: ties within 1e-13 are no error, of identical codes the lowest counts), the rows whose
code or squared distance is not what the index says, and what each step of the search decided. The reference
(reference.py) is itself held against `brute_force_nearest` on the first rows of every turn.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from search_verification import wrong_rows
from torch import Tensor

from gpu.exactness_data import (
    PARTS,
    Pair,
    Part,
    drawn_blocks,
    embedding_blocks,
    num_patches,
    patch_blocks,
    rehearsed,
)
from gpu.pictures import load_pictures
from gpu.reference import float64_nearest
from gpu.results import Results
from gpu.stage import FINISHED, Context
from gpu.training import trained_model
from vq_kernels.search.api import nearest_code_op
from vq_kernels.search.reference import brute_force_nearest
from vqae import VQAE

TURNS = 8
_REFERENCE_ROWS = 4096  # of each turn, on which the reference itself is checked
_KEPT_EXAMPLES = 3
_OF_PICTURES = ("patches", "embeddings")


@dataclass
class Count:
    """What was found, in rows."""

    rows: int = 0
    wrong: int = 0
    wrong_codes: int = 0
    wrong_distances: int = 0
    proved: int = 0
    resolved: int = 0
    drained: int = 0


def run(context: Context) -> str:
    """Do what turns the results do not hold yet; embeddings last, since their model may have to be trained first."""
    results = context.results("exactness")
    parts, turns = (tuple(rehearsed(part) for part in PARTS), 1) if context.rehearse else (PARTS, TURNS)
    work = [(part, turn) for turn in range(turns) for part in parts]
    work.sort(key=lambda piece: piece[0].kind == "embeddings")
    work = [(part, turn) for part, turn in work if not results.has(part=part.name, turn=turn)]
    pictures = load_pictures(context) if any(part.kind in _OF_PICTURES for part, _ in work) else None
    model: VQAE | None = None
    slowest = 0.0
    for part, turn in work:
        if part.kind in _OF_PICTURES and pictures is None:
            continue
        if context.left_s() < 2 * slowest + 5:
            return summary(results, parts, turns, "no time left")
        if part.kind == "embeddings" and model is None:
            model = trained_model(context)
        start = time.monotonic()
        do_turn(results, part, turn, blocks(part, turn, turns, context.device, pictures, model))
        slowest = max(slowest, time.monotonic() - start)
    return summary(results, parts, turns, "no --data-dir")


def summary(results: Results, parts: tuple[Part, ...], turns: int, reason: str) -> str:
    """What came of the stage: finished, failed, or how many rows are left and why."""
    lines = [line for line in results.lines if any(line["part"] == part.name for part in parts)]
    done = sum(line["rows"] for line in lines)
    errors = ("wrong", "wrong_codes", "wrong_distances", "reference_wrong")
    found = ", ".join(f"{sum(line[name] for line in lines)} {name}" for name in errors)
    print(f"  {done:,} rows: {found}", flush=True)
    if any(line[name] for line in lines for name in errors):
        return f"failed: {found} of {done:,} rows"
    left = [part for part in parts if not all(results.has(part=part.name, turn=turn) for turn in range(turns))]
    if not left:
        return FINISHED
    rows = sum(part.rows for part in parts) - done
    return f"{done:,} rows done, none wrong; about {rows:,} left ({', '.join(part.name for part in left)}): {reason}"


def blocks(
    part: Part, turn: int, turns: int, device: torch.device, pictures: Tensor | None, model: VQAE | None
) -> Iterator[Pair]:
    """The rows of a turn with their codes."""
    seed = 1000 * (1 + [one.name for one in PARTS].index(part.name)) + turn
    if part.kind not in _OF_PICTURES:
        return drawn_blocks(part, -(-part.rows // turns), seed, device)
    assert pictures is not None
    if part.kind == "embeddings":
        assert model is not None
        return embedding_blocks(model, pictures, turn, -(-part.rows // turns))
    total = min(part.rows, num_patches(pictures, part.patch_side))
    rows = slice(total * turn // turns, total * (turn + 1) // turns)
    return patch_blocks(part, rows, seed, pictures)


def do_turn(results: Results, part: Part, turn: int, pairs: Iterator[Pair]) -> None:
    """Search the blocks of a turn, check them, and write its line."""
    start = time.monotonic()
    count = Count()
    reference_rows = reference_wrong = 0
    examples: list[dict[str, Any]] = []
    sizes: dict[str, int] = {}
    for number, (x, codebook) in enumerate(pairs):
        sizes = {"K": codebook.shape[0], "D": codebook.shape[1]}
        reference = float64_nearest(x, codebook)
        if number == 0:
            first = x[:_REFERENCE_ROWS]
            slow = brute_force_nearest(first, codebook)
            reference_rows = first.shape[0]
            reference_wrong = int(wrong_rows(first, codebook, reference[: first.shape[0]], slow).sum())
        wrong, found = check_block(x, codebook, reference, count)
        for row in wrong.nonzero()[: _KEPT_EXAMPLES - len(examples), 0].tolist():
            examples.append({"block": number, "row": row, "found": int(found[row]), "expected": int(reference[row])})
    results.add(
        part=part.name,
        turn=turn,
        **vars(count),
        reference_rows=reference_rows,
        reference_wrong=reference_wrong,
        **sizes,
        dtype=str(part.dtype).removeprefix("torch."),
        seconds=round(time.monotonic() - start, 2),
        examples=examples,
    )


def check_block(x: Tensor, codebook: Tensor, reference: Tensor, count: Count) -> tuple[Tensor, Tensor]:
    """Search x [n, D] in codebook [K, D], hold everything found against the reference [n], and add to the count.

    Returns:
        Which indices are wrong, [n] bool, and the indices found, [n] int64.
    """
    indices, codes, sq_distances, statistics = nearest_code_op(x, codebook, [], "triton", "exact")
    wrong = wrong_rows(x, codebook, indices, reference)
    chosen = codebook[indices.clamp(0, codebook.shape[0] - 1)]
    true_distances = (x.double() - chosen.double()).square_().sum(dim=1)
    off = (sq_distances.double() - true_distances).abs() > 1e-5 * true_distances + 1e-30
    count.rows += x.shape[0]
    count.wrong += int(wrong.sum())
    count.wrong_codes += int((codes != chosen).any(dim=1).sum())
    count.wrong_distances += int((off | sq_distances.isnan()).sum())
    proved, resolved, drained = statistics.tolist()
    count.proved, count.resolved, count.drained = (
        count.proved + proved, count.resolved + resolved, count.drained + drained,
    )  # fmt: skip
    return wrong, indices
