"""The scores of every configuration stay within the certificate's bound E, on benign and on adversarial data."""

import pytest
import torch
from torch import Tensor

from tests.gpu.device import DEVICE, MARKS, SMALL
from tests.vq_kernels.search.triton_rows import FEW_ROWS, rounded_rows, row_ratios, scan_in_two, unrounded_scores
from vq_kernels.search.triton.launch import prepare
from vq_kernels.search.triton.plan import CONFIGS, ScanConfig
from vq_kernels.search.triton.prepare import TritonCodebook

pytestmark = MARKS
N, K = (32, 150) if SMALL else (4096, 1024)
CASES = [
    (config, d)
    for config in CONFIGS
    for d in (((64,) if SMALL else (8, 64, 128)) if config.resident else ((72,) if SMALL else (72, 256, 512, 2048)))
    if not config.resident or d <= config.block_d
]


def vectors(name: str, d: int) -> tuple[Tensor, Tensor]:
    """x [N, d] and a codebook [K, d]."""
    generator = torch.Generator().manual_seed(3)
    x, codebook = torch.randn(N, d, generator=generator), torch.randn(K, d, generator=generator)
    if name == "equal products":  # each a little less than what the accumulator keeps beside h
        signs = torch.where(torch.arange(K) % 2 == 0, 1.0, -1.0)[:, None]
        return torch.full((N, d), 2.0**-18 * (2 - 2.0**-9)), signs * torch.ones(K, d)
    if name == "near the mean":
        return codebook.mean(0) + 1e-5 * x, codebook
    if name == "offset":
        return x + 1000, codebook + 1000
    if name == "one sign":
        return x.abs(), codebook.abs()
    return (1e4 * x if name == "far" else x), codebook


@pytest.mark.parametrize(
    "name", ["gaussian", "equal products", *([] if SMALL else ["near the mean", "offset", "one sign", "far"])]
)
@pytest.mark.parametrize(("config", "d"), CASES, ids=[f"{config.name}-{d}" for config, d in CASES])
def test_scores_stay_within_the_bound(config: ScanConfig, d: int, name: str) -> None:
    x, codebook = (tensor.to(DEVICE) for tensor in vectors(name, d))
    prepared = TritonCodebook(*prepare(codebook))
    plan, states, margins, _ = scan_in_two(x, codebook, prepared, config)

    rows = rounded_rows(scan_in_two(x, codebook, prepared, FEW_ROWS)[3]).double()
    codes, half_norms = prepared.codes16[:K, :d].double(), prepared.half_norms[:K].double() * row_ratios(x, prepared)
    sums = rows @ codes.t() - half_norms  # the exact sum of the float16 products
    magnitude = (rows.norm(dim=1) * codes.norm(dim=1).max() + half_norms.amax(1))[:, None]
    true_scores = unrounded_scores(x, codebook, prepared)
    bound = margins.double()[:, None] / 2
    for split in range(plan.splits):
        values, places = states[split, :4].view(torch.float32).t(), states[split, 5:].t().long()  # [N, 4]
        first = split * plan.tiles_per_split * config.block_k
        last = min(first + plan.tiles_per_split * config.block_k, K)
        assert ((places >= first) & (places < last)).all()
        share = ((values.double() - true_scores.gather(1, places)).abs() / bound).max().item()
        assert share <= 1, f"a score is off by {share:.3f} of the bound"
        unpacked = (values.contiguous().view(torch.int32) & ~plan.tile_mask).view(torch.float32).double()
        hidden_by_packing = magnitude * 2.0**-23 * (plan.tile_mask + 1)
        error = ((unpacked - sums.gather(1, places)).abs() - hidden_by_packing).clamp(min=0)
        share = (error / ((d + 16) * 2.0**-23 * magnitude)).max().item()
        assert share <= 1, f"the accumulator is off by {share:.3f} of its bound"
        others = true_scores[:, first:last].scatter(1, places - first, -torch.inf).amax(1)
        assert (others <= states[split, 4].view(torch.float32).double() + bound[:, 0]).all(), "a code is above `hidden`"
