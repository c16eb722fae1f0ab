"""Sums of losses, and the first step at which one was not finite."""

import math

import pytest
import torch

from vqae.runtime.errors import DivergedError
from vqae.training.metrics import LossMeter

CPU = torch.device("cpu")


def watch_of(*losses: tuple[float, float]) -> LossMeter:
    watch = LossMeter(CPU)
    for step, (reconstruction, codebook) in enumerate(losses, start=1):
        watch.add(torch.tensor(reconstruction, requires_grad=True), torch.tensor(codebook), step)
    return watch


def test_means() -> None:
    watch = watch_of((1.0, 10.0), (2.0, 30.0))
    watch.check()
    assert watch.means() == (1.5, 20.0)
    assert not watch.sums.requires_grad


def test_means_of_nothing_are_nan() -> None:
    assert all(math.isnan(mean) for mean in LossMeter(CPU).means())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_bad_step_is_named(bad: float) -> None:
    for losses in ((bad, 1.0), (1.0, bad)):
        watch = watch_of((1.0, 1.0), losses, (bad, bad), (1.0, 1.0))
        with pytest.raises(DivergedError, match="not finite at step 2"):
            watch.check()


def test_state_dict_goes_on_where_it_was() -> None:
    watch = LossMeter(CPU)
    watch.load_state_dict(watch_of((1.0, 10.0), (2.0, 30.0)).state_dict())
    watch.add(torch.tensor(6.0), torch.tensor(20.0), 3)
    assert watch.means() == (3.0, 20.0)
