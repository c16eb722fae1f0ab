"""Sums of losses, and the first step at which one was not finite."""

import math

import pytest
import torch

from vqae.runtime.errors import DivergedError
from vqae.training.metrics import LossMeter

CPU = torch.device("cpu")


def meter_of(*losses: tuple[float, float]) -> LossMeter:
    meter = LossMeter(CPU)
    for step, (reconstruction, codebook) in enumerate(losses, start=1):
        meter.add(torch.tensor([reconstruction, codebook], requires_grad=True), step)
    return meter


def test_means() -> None:
    meter = meter_of((1.0, 10.0), (2.0, 30.0))
    meter.check()
    assert meter.means() == (1.5, 20.0)
    assert not meter.sums.requires_grad


def test_means_of_nothing_are_nan() -> None:
    assert all(math.isnan(mean) for mean in LossMeter(CPU).means())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_bad_step_is_named(bad: float) -> None:
    for losses in ((bad, 1.0), (1.0, bad)):
        meter = meter_of((1.0, 1.0), losses, (bad, bad), (1.0, 1.0))
        with pytest.raises(DivergedError, match="not finite at step 2"):
            meter.check()


def test_a_restored_meter_continues() -> None:
    before = meter_of((1.0, 10.0), (2.0, 30.0))
    meter = LossMeter(CPU, before.sums, before.steps)
    meter.add(torch.tensor([6.0, 20.0]), 3)
    assert meter.means() == (3.0, 20.0)
