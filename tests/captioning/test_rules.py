"""Each rule against the logits processor of transformers that it stands for; and what a search may not import."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    MinLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dbcap.captioning import rules

EXAMPLES = settings(max_examples=150)
SEEDS = st.integers(0, 2**32 - 1)
PENALTIES = st.floats(0.01, 100)


def logits(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 4, shape).astype(np.float32)


# ---- rules


@EXAMPLES
@given(seed=SEEDS, penalty=PENALTIES, row=st.lists(st.integers(0, 11), min_size=1, max_size=12))
@example(seed=0, penalty=0.8, row=[3, 3, 4])
def test_penalise(seed, penalty, row):
    scores = logits(seed, 1, 12)
    scores[0, row[0]] = 0.0
    plain = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([row]), torch.from_numpy(scores)).numpy()
    stands = np.isin(np.arange(12), row)
    assert np.array_equal(np.where(stands, rules.penalise(scores, penalty), scores), plain)
    assert rules.penalise(scores, penalty).dtype == np.float32


@EXAMPLES
@given(row=st.lists(st.integers(0, 3), min_size=1, max_size=14), size=st.integers(1, 5))
@example(row=[1, 2, 1, 2, 1], size=3)
@example(row=[0, 0, 0], size=2)
@example(row=[2], size=1)
@example(row=[1, 2], size=5)
def test_repeats(row, size):
    plain = NoRepeatNGramLogitsProcessor(size)(torch.tensor([row]), torch.zeros(1, 4))[0]
    assert set(rules.repeats(row, size)) == set(torch.nonzero(plain == -torch.inf)[:, 0].tolist())


@EXAMPLES
@given(seed=SEEDS, best=st.integers(1, 30), penalty=PENALTIES, data=st.data())
def test_merge_leaves_what_the_rule_leaves_of_the_whole_vocabulary(seed, best, penalty, data):
    """`best` candidates are asked for, of a vocabulary of 20, under all rules at once."""
    length = data.draw(st.integers(1, 8))
    rows = np.random.default_rng(seed).integers(0, 20, (3, length))
    scores = logits(seed, 3, 20)
    minimum = data.draw(st.integers(0, 9))
    ends = data.draw(st.lists(st.integers(0, 19), min_size=1, max_size=3, unique=True))
    plain = torch.from_numpy(scores)
    for processor in (
        RepetitionPenaltyLogitsProcessor(penalty),
        NoRepeatNGramLogitsProcessor(2),
        MinLengthLogitsProcessor(minimum, ends),
    ):
        plain = processor(torch.from_numpy(rows), plain)
    banned = [{*rules.repeats(row, 2), *(ends if length < minimum else [])} for row in rows.tolist()]
    lists = [sorted({*row, *no}) for row, no in zip(rows.tolist(), banned, strict=True)]
    most = max(map(len, lists))
    watched = np.array([row + [rules.NONE] * (most - len(row)) for row in lists])
    asked = scores[np.arange(3)[:, None], watched]
    changed = np.where(
        [np.isin(w, r) for w, r in zip(watched, rows, strict=True)], rules.penalise(asked, penalty), asked
    )
    changed[[[token in no for token in w] for w, no in zip(watched.tolist(), banned, strict=True)]] = -np.inf

    tokens = np.argsort(-scores, axis=1)[:, : best + most]
    tokens, values = rules.merge(tokens, np.take_along_axis(scores, tokens, 1), watched, changed)
    assert values.dtype == np.float32
    wanted = np.sort(plain.numpy(), axis=1)[:, ::-1][:, :best]
    order = np.argsort(-values, axis=1, kind="stable")[:, : wanted.shape[1]]
    assert np.array_equal(np.take_along_axis(values, order, 1), wanted)
    possible = wanted > -np.inf
    chosen = np.take_along_axis(tokens, order, 1)
    assert np.array_equal(np.take_along_axis(plain.numpy(), chosen, 1)[possible], wanted[possible])
    for row, so_many in zip(chosen, possible.sum(1), strict=True):
        assert len(set(row[:so_many])) == so_many, "no token stands twice"
    assert (tokens >= 0).all()


# ---- sampling


@EXAMPLES
@given(
    seed=SEEDS,
    temperature=st.floats(0.1, 10),
    top_k=st.integers(0, 20),
    top_p=st.one_of(st.just(1.0), st.floats(0.001, 0.999)),
)
@example(seed=1, temperature=0.01, top_k=0, top_p=0.5)
@example(seed=1, temperature=1.0, top_k=0, top_p=1e-9)
@example(seed=1, temperature=100.0, top_k=0, top_p=0.999999)
def test_warp(seed, temperature, top_k, top_p):
    values = np.sort(logits(seed, 16))[::-1].copy()
    plain = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(values)[None].double())
    if top_k:
        plain = TopKLogitsWarper(top_k)(None, plain)
    if top_p < 1:
        plain = TopPLogitsWarper(top_p)(None, plain)
    wanted = plain.softmax(-1)[0].numpy()
    found = rules.warp(values, temperature, top_k, top_p)
    assert len(found) == (min(top_k, 16) or 16)
    assert np.pad(found, (0, 16 - len(found))) == pytest.approx(wanted, abs=1e-9)


def test_warp_of_what_a_rule_forbids():
    found = rules.warp(np.array([1.0, 0.0, -np.inf], np.float32), 1.0, 0, 0.99)
    assert found[2] == 0
    assert found.sum() == pytest.approx(1)
    assert rules.warp(np.array([1.0, -np.inf], np.float32), 0.01, 0, 1.0).tolist() == [1.0, 0.0]


# ---- imports

HEAVY = ("torch", "transformers", "onnxruntime", "onnx", "diffusers", "lightning", "huggingface_hub", "optimum")


@pytest.mark.parametrize("module", ["search", "rules", "decoding"])
def test_a_search_needs_no_torch(module):
    program = f"import sys, dbcap.captioning.{module}\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
