"""A trimmed convolution is the plain one, in outputs, gradients and names."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import resnet18

from vqae.model.encoder import TrimmedConv2d


def assert_same(plain: nn.Module, x: torch.Tensor) -> None:
    """Outputs, and gradients of input and parameters, in float64."""
    trimmed = copy.deepcopy(plain)
    TrimmedConv2d.convert(trimmed)
    results = []
    for module in (plain, trimmed):
        leaf = x.clone().requires_grad_()
        output = module(leaf)
        output.backward(torch.sin(torch.arange(output.numel(), dtype=torch.float64)).view_as(output))
        results.append([output, leaf.grad, *(parameter.grad for parameter in module.parameters())])
    for value, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


side = st.tuples(st.integers(1, 7), st.integers(1, 3), st.integers(0, 3), st.integers(1, 9)).filter(
    lambda side: side[3] + 2 * side[2] >= side[0]
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rows=side, columns=side, groups=st.sampled_from([1, 2]), bias=st.booleans())
def test_equals_the_plain_convolution(
    rows: tuple[int, int, int, int], columns: tuple[int, int, int, int], groups: int, bias: bool
) -> None:
    kernel, stride, padding, size = zip(rows, columns, strict=True)
    generator = torch.Generator().manual_seed(0)
    plain = nn.Conv2d(2, 4, kernel, stride, padding, groups=groups, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.normal_(generator=generator)
    sequence = nn.Sequential(plain)
    assert_same(sequence, torch.randn(2, 2, *size, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize(
    "options", [{"dilation": 2, "padding": 2}, {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}]
)
def test_other_convolutions_are_not_converted(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 3, 3, dtype=torch.float64, **options))
    assert_same(plain, torch.randn(2, 2, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (5, 1)])
def test_resnet_is_unchanged(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    assert_same(resnet18(weights=None).double().eval(), torch.randn(1, 3, *size, dtype=torch.float64))


def test_a_single_image_without_a_batch() -> None:
    torch.manual_seed(0)
    assert_same(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64)), torch.randn(2, 1, 4).double())


def test_trimmed_taps_get_zero_gradients() -> None:
    torch.manual_seed(0)
    trimmed = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1))
    TrimmedConv2d.convert(trimmed)
    trimmed(torch.ones(1, 1, 1, 1)).sum().backward()
    expected = torch.zeros(1, 1, 3, 3)
    expected[0, 0, 1, 1] = 1
    assert torch.equal(trimmed[0].weight.grad, expected)


def test_state_dict_names_and_parameters_stay() -> None:
    model = resnet18(weights=None)
    names, parameters = list(model.state_dict()), list(model.parameters())
    TrimmedConv2d.convert(model)
    assert list(model.state_dict()) == names
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert sum(isinstance(module, TrimmedConv2d) for module in model.modules()) == 20


@pytest.mark.parametrize(("kernel", "size", "shape"), [(3, 1, (1, 1)), (3, 2, (3, 3)), (7, 2, (3, 3))])
def test_only_taps_that_meet_a_pixel_take_part(
    kernel: int, size: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    conv2d = nn.functional.conv2d

    def spy(x: torch.Tensor, weight: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        seen.append(tuple(weight.shape[2:]))
        return conv2d(x, weight, *arguments, **options)

    monkeypatch.setattr(nn.functional, "conv2d", spy)
    trimmed = nn.Sequential(nn.Conv2d(1, 1, kernel, padding=kernel // 2))
    TrimmedConv2d.convert(trimmed)
    trimmed(torch.ones(1, 1, size, size))
    assert seen == [shape]
