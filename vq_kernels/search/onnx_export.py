"""The search in ONNX's own operators: what stands in place of the operator in a model that `torch.onnx.export` writes.

It is written in PyTorch, which the exporter translates (onnx and onnxscript are its needs alone), and takes two steps:

1. scan: with m the mean of the usable codes, X = x - m, C_k = c_k - m, the float64 scores S_k = X·C_k - ½‖C_k‖² of a
   tile of codes at a time, of which the best, its index and the runner-up are kept. A score is off by at most
   E = f·(‖X‖·R + R²), with R = max ‖C_k‖ and f = 2.02·(D + 16)·2⁻⁵³ (exactness.md, (a), the float64 scan: E_k of
   the longest code). Best - runner-up > 2·E proves the best. Where float64 overflows, E is Inf or NaN and proves
   nothing; where it underflows, nor does a difference below 2⁻⁹⁰⁰;
2. direct: each row that is left gets all K distances, by direct float64 differences; the least wins, the lowest index
   on a tie.

Cost in onnxruntime, on one core: 0.3 ns for each of the K·D numbers of a row at D = 64, 0.1 ns at D = 256; 1 to 2 ns
more where it takes step 2: rows do whose nearest code stands twice in the codebook, of others hardly any. Memory: a few
float64 copies of x and of the codebook, N·128 scores, and K·D differences; never N·K.
"""

import torch
from torch import Tensor

_TILE_CODES = 128
_ROUNDOFF = 2.0**-53
_TINY = 2.0**-900


def search(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Search all rows of x [N, D] in codebook [K, D], both of any floating dtype, exactly.

    A module becomes this by itself in `torch.onnx.export(module.eval(), (x,), dynamo=True)`. A program that
    `torch.export` has captured before has the operator, which this can replace:
    `program.run_decompositions({torch.ops.vq_kernels.nearest_code.default: lambda x, codes, *_: search(x, codes)})`.

    Returns:
        indices [N] int64, codes [N, D] in x's dtype, sq_distances [N] float32, statistics [3] int64: rows proved by the
        scan (or not finite, which need no search), 0, rows that took direct differences.

    Raises:
        RuntimeError: the export is that of TorchScript, dynamo=False.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        raise RuntimeError("dynamo must be True to export a search by torch.onnx.export, got False")
    rows, codes = x.double(), codebook.double()
    usable, finite = codes.isfinite().all(dim=1), rows.isfinite().all(dim=1)
    indices, proved = _scan_tiles(rows, codes, usable)
    undecided = finite & ~proved
    places = undecided.nonzero()[:, 0]
    chosen = _choose_directly(rows[places], codes, usable)
    indices = torch.where(finite, indices.scatter(0, places, chosen), 0)
    sq_distances = (rows - codes.index_select(0, indices)).square().sum(dim=1)
    sq_distances = torch.where(finite, sq_distances, torch.nan).float()
    drained = undecided.sum()
    statistics = torch.stack([undecided.numel() - drained, torch.zeros_like(drained), drained])
    return indices, codebook.index_select(0, indices).to(x.dtype), sq_distances, statistics


def _scan_tiles(rows: Tensor, codes: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """The code with the best score, [N] int64, of rows [N, D] in codes [K, D], float64, and where it is proved, [N]."""
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
    best: Tensor,
    runner_up: Tensor,
    indices: Tensor,
    codes: Tensor,
    half_sq_norms: Tensor,
    first: Tensor,
    rows: Tensor,
    slots: Tensor,
) -> list[Tensor]:
    """One more tile of codes [T, D], the first of which is code `first` []: the best and the second best score, [N]."""
    scores = rows @ codes.t() - half_sq_norms  # [N, T]
    tile_best, slot = scores.max(dim=1)
    others = torch.where(slots == slot[:, None], -torch.inf, scores).amax(dim=1)
    runner_up = torch.maximum(torch.maximum(runner_up, others), torch.minimum(best, tile_best))
    indices = torch.where(tile_best > best, slot + first, indices)
    return [torch.maximum(best, tile_best), runner_up, indices, first.clone()]


def _choose_directly(rows: Tensor, codes: Tensor, usable: Tensor) -> Tensor:
    """The nearest of codes [K, D] for each of rows [M, D], by direct differences: [M] int64."""
    some_rows = torch.cat([torch.zeros_like(codes[:1]), rows])  # onnxruntime's Scan refuses no rows
    begin = [torch.zeros(1, device=codes.device)]
    _, chosen = torch.ops.higher_order.scan(_nearest_to_one, begin, [some_rows], (codes, usable))
    nearest: Tensor = chosen[1:]
    return nearest


def _nearest_to_one(unused: Tensor, row: Tensor, codes: Tensor, usable: Tensor) -> list[Tensor]:
    """The nearest of codes [K, D] to a row [D]: [] int64."""
    differences = row - codes
    sq_distances = torch.where(usable, (differences * differences).sum(dim=1), torch.inf)
    return [unused.clone(), sq_distances.argmin()]
