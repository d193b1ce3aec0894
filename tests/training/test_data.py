"""What micro-batches hold: a function of the seed and their number."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dbcap.training.data import Data, Drawing, Micro, Shown
from dbcap.training.latents import Latent


def shown(first: int, *views: int) -> tuple[Shown, ...]:
    """Return pictures with so many views each; the mean of view v of picture p is 10 p + v, without deviation."""
    return tuple(
        Shown(tuple(Latent(torch.full((2, 4, 4), 10.0 * at + v), torch.zeros(2, 4, 4)) for v in range(count)), at)
        for at, count in enumerate(views, first)
    )


PHOTOS, CLASSES = shown(0, 1, 3, 2), shown(3, 1, 1, 1, 1)
DRAWING = Drawing(seed=7, batch_size=2, times=1000, offset_noise=0.0)


def micro(start=0, photos=PHOTOS, classes=CLASSES, **changes):
    return Micro(photos, classes, Drawing(**{**vars(DRAWING), **changes}), start)


def said(batch):
    """Return all that a batch holds, for comparing."""
    tensors = (batch.clean, batch.noise, batch.times, batch.captions)
    return [one.tolist() for one in tensors], batch.instances, batch.number


def test_rows_are_of_the_subject_and_then_of_the_class():
    batch = micro().batch(0)
    assert (batch.clean.shape, batch.instances, batch.number) == ((4, 2, 4, 4), 2, 0)
    assert batch.noise.shape == batch.clean.shape
    assert (batch.times.dtype, batch.captions.dtype) == (torch.int64, torch.int64)
    assert [number < 3 for number in batch.captions.tolist()] == [True, True, False, False]
    assert (batch.clean[:, 0, 0, 0] // 10).tolist() == batch.captions.tolist()
    alone = micro(classes=()).batch(0)
    assert (len(alone.clean), alone.instances) == (2, 2)
    assert torch.equal(alone.noise, batch.noise[:2]), "class images change nothing for photos"
    assert len({tuple(row) for row in batch.noise.flatten(1).tolist()}) == 4


def test_every_picture_is_shown_once_an_epoch_and_every_view_at_some_time():
    counts = Counter(number for at in range(60) for number in micro().batch(at).captions.tolist())
    assert counts == {0: 40, 1: 40, 2: 40, 3: 30, 4: 30, 5: 30, 6: 30}
    views = {value for at in range(60) for value in micro().batch(at).clean[:2, 0, 0, 0].tolist()}
    assert views == {0, 10, 11, 12, 20, 21}


def test_times_are_spread_evenly_and_noise_is_normal():
    batches = [micro(batch_size=50).batch(number) for number in range(20)]
    times = torch.cat([one.times for one in batches]).double()
    noise = torch.cat([one.noise for one in batches])
    assert (times.min() < 10, times.max() >= 990) == (True, True)
    assert times.mean().item() == pytest.approx(499.5, abs=25)
    assert (noise.mean().item(), noise.std().item()) == pytest.approx((0, 1), abs=0.02)


def test_latents_are_drawn_anew_from_their_distribution():
    photo = Shown((Latent(torch.full((2, 4, 4), 3.0), torch.full((2, 4, 4), 0.5)),), 0)
    clean = torch.cat([micro(photos=(photo,), classes=()).batch(number).clean for number in range(200)])
    assert (clean.mean().item(), clean.std().item()) == pytest.approx((3, 0.5), abs=0.02)
    assert len(clean.unique(dim=0)) == 400


@given(start=st.integers(0, 10**7), seed=st.integers(0, 2**64 - 1))
def test_beginning_in_the_middle_is_as_if_it_had_run_there(start, seed):
    found = [said(one) for one in islice(micro(start, seed=seed), 3)]
    assert found == [said(micro(seed=seed).batch(number)) for number in range(start, start + 3)]


def test_micro_batches_of_a_step_are_one_batch_of_the_same_samples():
    halves, whole = [micro().batch(number) for number in (6, 7)], micro(batch_size=4).batch(3)
    for name in ("clean", "noise", "times", "captions"):
        parts = [getattr(half, name) for half in halves]
        joined = torch.cat([*(part[:2] for part in parts), *(part[2:] for part in parts)])
        assert torch.equal(joined, getattr(whole, name))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    loader = DataLoader(micro(5), batch_size=None, num_workers=workers)
    found = [said(batch) for batch in islice(loader, 5)]
    assert found == [said(micro().batch(number)) for number in range(5, 10)]


def test_offset_noise_is_one_number_for_each_channel():
    plain, offset = micro().batch(0), micro(offset_noise=0.5).batch(0)
    shift = offset.noise - plain.noise
    assert torch.allclose(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-6)
    assert len(shift[:, :, 0, 0].unique()) == 8
    assert (torch.equal(plain.clean, offset.clean), torch.equal(plain.times, offset.times)) == (True, True)


def test_a_loader_begins_where_the_run_stands():
    data = Data(PHOTOS, CLASSES, DRAWING, accumulate=3, workers=0)
    assert next(iter(data.train_dataloader())).number == 0
    data.trainer = SimpleNamespace(global_step=4)
    assert next(iter(data.train_dataloader())).number == 12


def test_a_batch_moves_whole():
    batch = micro().batch(3)
    moved = batch.to(torch.device("meta"))
    assert (moved.instances, moved.number) == (2, 3)
    assert {one.device.type for one in (moved.clean, moved.noise, moved.times, moved.captions)} == {"meta"}
