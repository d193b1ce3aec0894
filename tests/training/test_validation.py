"""Losses that can be compared from one step to another."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dbcap.training.data import Shown
from dbcap.training.latents import Latent
from dbcap.training.validation import Validation


def shown(*numbers: int) -> list[Shown]:
    return [Shown((Latent(torch.full((2, 4, 4), float(one)), torch.ones(2, 4, 4)),), one) for one in numbers]


class Model:
    """Has an error for each row that says which picture and time it is of; keeps the batches."""

    device = torch.device("cpu")
    objective = SimpleNamespace(prior_weight=0.5)

    def __init__(self):
        self.batches = []

    def errors(self, batch):
        self.batches.append(batch)
        return batch.clean.mean((1, 2, 3)) + batch.times / 1000


@pytest.mark.parametrize("rows", [1, 3, 5, 100])
def test_each_picture_and_time_counts_alike(rows):
    model = Model()
    found = Validation(shown(1, 2, 6), shown(10), 1000, rows).run(model)
    times = sum((125, 375, 625, 875)) / 4 / 1000
    assert found.instance == pytest.approx(3 + times)
    assert found.prior == pytest.approx(10 + times)
    assert found.value == pytest.approx(found.instance + 0.5 * found.prior)
    assert sum(len(batch.clean) for batch in model.batches) == 16
    assert all(batch.instances == len(batch.clean) <= rows for batch in model.batches)


def test_pictures_noise_and_times_are_always_the_same():
    first, second = Model(), Model()
    torch.manual_seed(1)
    Validation(shown(1, 2), shown(3), 1000, 4).run(first)
    torch.manual_seed(2)
    Validation(shown(1, 2), shown(3), 1000, 4).run(second)
    for one, other in zip(first.batches, second.batches, strict=True):
        for name in ("clean", "noise", "times", "captions"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert len(torch.cat([one.noise for one in first.batches]).unique(dim=0)) == 12
    assert first.batches[0].times.tolist() == [125, 375, 625, 875]
    assert first.batches[0].captions.tolist() == [1] * 4


def test_there_are_few_enough_of_them():
    model = Model()
    found = Validation(shown(*range(9)), [], 10, 2).run(model)
    assert {int(batch.captions[0]) for batch in model.batches} == {0, 1, 2, 3}
    assert found.prior is None
    assert found.value == found.instance
