"""What is drawn depends on what it is for, and on nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbcap.training import randomness

SEEDS = st.integers(0, 2**64 - 1)


@given(seed=SEEDS, stream=st.sampled_from(["instance", "class"]), count=st.integers(1, 40), epoch=st.integers(0, 1000))
def test_each_is_shown_once_an_epoch(seed, stream, count, epoch):
    places = [randomness.place(seed, stream, epoch * count + number, count) for number in range(count)]
    assert sorted(places) == list(range(count))


@given(seed=SEEDS, count=st.integers(1, 40), sample=st.integers(0, 10**6))
def test_a_place_is_known_without_those_before_it(seed, count, sample):
    randomness._order.cache_clear()
    alone = randomness.place(seed, "instance", sample, count)
    around = range(sample // count * count, sample + 1)
    assert alone == [randomness.place(seed, "instance", number, count) for number in around][-1]


def test_orders_differ_by_epoch_stream_and_seed():
    def order(seed, stream, epoch):
        return tuple(randomness.place(seed, stream, epoch * 20 + number, 20) for number in range(20))

    orders = {order(seed, stream, epoch) for seed in range(3) for stream in ("instance", "class") for epoch in range(3)}
    assert len(orders) == 18


def test_words_are_kept_apart():
    drawn = {randomness.seed_of(*parts) for parts in (("a", "bc"), ("ab", "c"), ("abc",), (1, 23), (12, 3), (1, 2, 3))}
    assert len(drawn) == 6
    assert randomness.seed_of(1) == randomness.seed_of("1")


def test_draws_stay_what_they_were():
    """Another way to draw would let runs of an earlier version go on to other bits."""
    assert randomness.seed_of(0, "instance", 7) == 0xB7B15C0719E365B8
    drawn = torch.randn(2, generator=randomness.generator(0, "instance", 7)).tolist()
    assert drawn == pytest.approx([0.8745576, 0.0984887], abs=1e-6)
    assert [randomness.place(0, "instance", number, 10) for number in range(10)] == [4, 8, 7, 9, 0, 2, 5, 1, 3, 6]


def test_libraries_draw_from_what_they_are_told_and_disturb_nobody():
    torch.manual_seed(5)
    expected = torch.rand(3).tolist()
    torch.manual_seed(5)
    found = []
    for _ in range(2):
        with randomness.library_draws(1, "dropout", 4):
            found.append(torch.nn.functional.dropout(torch.ones(50), 0.5))
    with randomness.library_draws(1, "dropout", 5):
        other = torch.nn.functional.dropout(torch.ones(50), 0.5)
    assert torch.rand(3).tolist() == expected
    assert torch.equal(*found)
    assert not torch.equal(found[0], other)
