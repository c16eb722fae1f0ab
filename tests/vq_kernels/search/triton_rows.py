"""Scans for tests, which read what a scan leaves before it is finished."""

import torch
from torch import Tensor

from vq_kernels.search.triton.common import Outputs, ceil_div
from vq_kernels.search.triton.plan import CONFIGS, ScanConfig, SearchPlan, row_pitch
from vq_kernels.search.triton.prepare import TritonCodebook
from vq_kernels.search.triton.scan import launch_scan

FEW_ROWS = next(config for config in CONFIGS if config.name == "few_rows")


def scan_in_two(
    x: Tensor, codebook: Tensor, prepared: TritonCodebook, config: ScanConfig
) -> tuple[SearchPlan, Tensor, Tensor, Tensor]:
    """Scan both parts of a codebook. Returns the plan, the states, the margins [N] and the memory of the codes."""
    tiles = ceil_div(codebook.shape[0], config.block_k)
    plan = SearchPlan(config, 2, ceil_div(tiles, 2))
    num_rows = x.shape[0]
    outputs = Outputs(
        indices=torch.empty(num_rows, dtype=torch.int64, device=x.device),
        codes=torch.empty_like(x),
        sq_distances=torch.empty(num_rows, dtype=torch.float64, device=x.device),
    )
    statistics = torch.empty(3, dtype=torch.int64, device=x.device)
    states = launch_scan(x, codebook, prepared, plan, outputs, statistics)
    assert states is not None
    return plan, states, outputs.sq_distances.view(torch.float32)[::2], outputs.codes


def rounded_rows(codes: Tensor) -> Tensor:
    """x' [N, D] float16, from the memory of the float32 codes [N, D] that a scan with FEW_ROWS left."""
    d, pitch = codes.shape[1], row_pitch(codes.shape[1])
    blocks = [block.view(torch.float16).flatten() for block in codes.split(FEW_ROWS.block_n)]
    return torch.cat([block[: len(block) // (2 * d) * pitch].view(-1, pitch)[:, :d] for block in blocks])


def row_ratios(x: Tensor, prepared: TritonCodebook) -> Tensor:
    """The scale of the half norms for each row, [N, 1] float64: at least 2**-40."""
    return torch.exp2((_row_exponents(x, prepared) - prepared.exponent).clamp(min=-40))


def unrounded_scores(x: Tensor, codebook: Tensor, prepared: TritonCodebook) -> Tensor:
    """X . C - h [N, K] in float64, on the scales that the kernels choose for the rows and for the codebook."""
    exponents, code_exponent = _row_exponents(x, prepared), prepared.exponent
    rows = (x.double() - prepared.shift.double()) * torch.exp2(exponents)
    codes = (codebook.double() - prepared.shift.double()) * 2.0**code_exponent
    return rows @ codes.t() - 0.5 * codes.square().sum(1) * torch.exp2(exponents - code_exponent)


def _row_exponents(x: Tensor, prepared: TritonCodebook) -> Tensor:
    largest = (x - prepared.shift).abs().amax(1, keepdim=True)
    exponents = 13 - ((largest.view(torch.int32) >> 23) - 127)
    return exponents.clamp(max=min(prepared.exponent + 20, 126)).double()
