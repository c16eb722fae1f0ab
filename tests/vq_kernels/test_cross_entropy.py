"""The chunked cross-entropy against the softmax over all logits at once, in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vq_kernels import cross_entropy
from vq_kernels.cross_entropy import Metric, code_cross_entropy


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(x: Tensor, codebook: Tensor, targets: Tensor, metric: Metric) -> Tensor:
    if metric == "dot":
        logits = x @ codebook.t()
    else:
        logits = -(x[:, None] - codebook).square().sum(dim=2).clamp(min=1e-8).sqrt()
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


@pytest.fixture(params=[1, 64, 1 << 21])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one row, a few rows, and all rows."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("metric", ["euclidean", "dot"])
@pytest.mark.parametrize(("num_rows", "num_codes", "code_dim"), [(1, 1, 1), (30, 7, 5), (13, 20, 3)])
def test_loss_and_gradients(num_rows: int, num_codes: int, code_dim: int, metric: Metric) -> None:
    x, codebook = draw(num_rows, code_dim), draw(num_codes, code_dim, seed=1)
    targets = torch.randint(-1, num_codes, (num_rows,), generator=torch.Generator().manual_seed(2))
    results = []
    for function in (code_cross_entropy, reference):
        inputs = [x.clone().requires_grad_(), codebook.clone().requires_grad_()]
        loss = function(*inputs, targets, metric=metric)
        (3 * loss).backward()
        results.append([loss.detach(), *(tensor.grad for tensor in inputs)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("metric", ["euclidean", "dot"])
def test_gradcheck(metric: Metric) -> None:
    targets = torch.tensor([0, -1, 3, 2, 0])
    inputs = draw(5, 3).requires_grad_(), draw(4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, codes: code_cross_entropy(x, codes, targets, metric=metric), inputs)


def test_a_row_on_its_code_has_a_finite_gradient() -> None:
    codebook = draw(5, 3).float()
    x = codebook.clone().requires_grad_()
    code_cross_entropy(x, codebook, torch.arange(5)).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_data_with_an_offset() -> None:
    x, codebook = (1000 + draw(50, 8)).float(), (1000 + draw(20, 8, seed=1)).float()
    targets = torch.arange(50) % 20
    expected = reference(x.double(), codebook.double(), targets, "euclidean")
    torch.testing.assert_close(code_cross_entropy(x, codebook, targets).double(), expected, rtol=1e-6, atol=0)


def test_no_rows_and_targets_out_of_range() -> None:
    assert code_cross_entropy(torch.zeros(0, 3), torch.zeros(4, 3), torch.zeros(0, dtype=torch.int64)) == 0
    for target in (-2, 4):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            code_cross_entropy(torch.zeros(1, 3), torch.zeros(4, 3), torch.tensor([target]))


def test_no_n_by_k_tensor_is_kept() -> None:
    kept = []
    x, codebook = draw(100, 3).requires_grad_(), draw(200, 3, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        code_cross_entropy(x, codebook, torch.arange(100)).backward()
    assert max(kept) <= codebook.numel()
