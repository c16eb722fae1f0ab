"""The search in standard ONNX operators, which `torch.onnx.export` writes instead of the custom operator.

It is written in PyTorch and translated by the exporter; only the exporter needs onnx and onnxscript. It has two steps:

1. Scan. Let m be the mean of the finite codes, X = x - m and C_k = c_k - m. The float64 scores X·C_k - ½‖C_k‖² are
   computed for a tile of codes at a time, keeping the best, its index and the runner-up. The error of a score is at
   most E = f·(‖X‖·R + R²), with R = max ‖C_k‖ and f = 2.02·(D + 16)·2⁻⁵³ (docs/explanations/exactness.md, part (a): E_k
   of the longest code in the float64 scan). A row is certified if best - runner-up > 2·E. If float64 overflows, E is
   Inf or NaN and certifies nothing. For underflow, 2⁻⁹⁰⁰ is added.
2. Exhaustive. Every other row gets all K distances by direct float64 differences. The least wins, with the lowest index
   on a tie.

Cost in onnxruntime on one core: 0.3 ns for each of the K·D elements per row at D = 64, 0.1 ns at D = 256; step 2 adds 1
to 2 ns. It is rare, except for rows whose nearest code occurs twice in the codebook. Memory: a few float64 copies of x
and of the codebook, N·128 scores, and K·D differences; never N·K.
"""

import torch
from torch import Tensor

from vq_kernels.search.backend import Found

_TILE_CODES = 128
_ROUNDOFF = 2.0**-53
_TINY = 2.0**-900


def search(x: Tensor, codebook: Tensor) -> Found:
    """Search all rows of x [N, D] in codebook [K, D], both of any floating dtype, exactly.

    `torch.onnx.export(module.eval(), (x,), dynamo=True)` uses this automatically. A program captured by `torch.export`
    contains the operator. To replace it, call
    `program.run_decompositions({torch.ops.vq_kernels.nearest_code.default: lambda x, codes, *_: search(x, codes)})`.

    Returns:
        As a backend's `search`; no row is reranked.

    Raises:
        RuntimeError: the export uses TorchScript (dynamo=False).
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        raise RuntimeError("dynamo must be True to export a search by torch.onnx.export, got False")
    rows, codes = x.double(), codebook.double()
    usable, finite = codes.isfinite().all(dim=1), rows.isfinite().all(dim=1)
    indices, certified = _scan_tiles(rows, codes, usable)
    undecided = finite & ~certified
    places = undecided.nonzero()[:, 0]
    chosen = _search_exhaustively(rows[places], codes, usable)
    indices = torch.where(finite, indices.scatter(0, places, chosen), 0)
    sq_distances = (rows - codes.index_select(0, indices)).square().sum(dim=1)
    sq_distances = torch.where(finite, sq_distances, torch.nan)
    exhaustive = undecided.sum()
    statistics = torch.stack([undecided.numel() - exhaustive, torch.zeros_like(exhaustive), exhaustive])
    return indices, codebook.index_select(0, indices).to(x.dtype), sq_distances, statistics


def _scan_tiles(rows: Tensor, codes: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """The best code [N] int64 for rows [N, D] in codes [K, D], both float64, and whether it is certified [N]."""
    num_codes, code_dim = codes.shape
    codes = torch.where(usable[:, None], codes, 0.0)
    shift = codes.sum(dim=0) / usable.sum().clamp(min=1)
    codes, rows = torch.where(usable[:, None], codes - shift, 0.0), rows - shift
    sq_norms = codes.square().sum(dim=1)
    half_sq_norms = torch.where(usable, 0.5 * sq_norms, torch.inf)

    padding = -num_codes % _TILE_CODES
    code_tiles = torch.cat([codes, codes.new_zeros(padding, code_dim)]).view(-1, _TILE_CODES, code_dim)
    half_tiles = torch.cat([half_sq_norms, codes.new_full((padding,), torch.inf)]).view(-1, _TILE_CODES)
    firsts = torch.arange(0, num_codes, _TILE_CODES, device=codes.device)
    slots = torch.arange(_TILE_CODES, device=codes.device)
    lowest = torch.full_like(rows[:, 0], -torch.inf)
    begin = [lowest, lowest.clone(), torch.zeros_like(lowest, dtype=torch.int64)]
    tiles = [code_tiles, half_tiles, firsts]
    best, runner_up, indices, _ = torch.ops.higher_order.scan(_score_tile, begin, tiles, (rows, slots))

    longest = sq_norms.amax(dim=0)
    error = 2.02 * (code_dim + 16) * _ROUNDOFF * (rows.square().sum(dim=1).sqrt() * longest.sqrt() + longest)
    return indices, best - runner_up > 2 * error + _TINY


def _score_tile(
    best: Tensor, runner_up: Tensor, indices: Tensor,
    codes: Tensor, half_sq_norms: Tensor, first: Tensor, rows: Tensor, slots: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Update best, runner_up and indices [N] with a tile of codes [T, D] that starts at code `first` []."""
    scores = rows @ codes.t() - half_sq_norms  # [N, T]
    tile_best, slot = scores.max(dim=1)
    others = torch.where(slots == slot[:, None], -torch.inf, scores).amax(dim=1)
    runner_up = torch.maximum(torch.maximum(runner_up, others), torch.minimum(best, tile_best))
    indices = torch.where(tile_best > best, slot + first, indices)
    return [torch.maximum(best, tile_best), runner_up, indices, first.clone()]


def _search_exhaustively(rows: Tensor, codes: Tensor, usable: Tensor) -> Tensor:
    """The nearest of codes [K, D] to each of rows [M, D] by direct differences, [M] int64."""
    some_rows = torch.cat([torch.zeros_like(codes[:1]), rows])  # onnxruntime's Scan needs a row
    begin = [torch.zeros(1, device=codes.device)]
    _, chosen = torch.ops.higher_order.scan(_nearest_to_one, begin, [some_rows], (codes, usable))
    nearest: Tensor = chosen[1:]
    return nearest


def _nearest_to_one(unused: Tensor, row: Tensor, codes: Tensor, usable: Tensor) -> list[Tensor]:
    """The nearest of codes [K, D] to a row [D], [] int64."""
    differences = row - codes
    sq_distances = torch.where(usable, (differences * differences).sum(dim=1), torch.inf)
    return [unused.clone(), sq_distances.argmin()]
