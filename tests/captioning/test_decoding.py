"""Settling the decoding: the user's options over the model's own, and what cannot work refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from dbcap.captioning.decoding import Decoding, settle
from dbcap.config.models import CaptionConfig
from dbcap.errors import UsageError
from dbcap.plugins.api import Capabilities

ABLE = Capabilities(beams=True, sampling=True, prompts=True, candidates=True, max_positions=64)
PLAIN = Capabilities(beams=False, sampling=False, prompts=False, candidates=False, max_positions=None)


def settled(defaults: dict[str, Any] | None = None, can: Capabilities = ABLE, **options: Any) -> Decoding:
    return settle(CaptionConfig(inputs=("x",), **options), defaults or {}, can, "org/model")


def test_without_anything_it_is_greedy_with_the_length_of_the_published_card():
    assert settled() == Decoding(num_beams=1, max_length=16)
    assert settled(can=PLAIN) == Decoding(num_beams=1, max_length=16)


OF_MODEL = {
    "num_beams": 4,
    "max_length": 32,
    "min_length": 3,
    "length_penalty": 0.5,
    "no_repeat_ngram_size": 2,
    "repetition_penalty": 1.5,
    "top_p": 0.9,
    "top_k": 30,
    "temperature": 0.7,
}


@pytest.mark.parametrize(
    ("defaults", "options", "expected"),
    [
        ({"max_length": 20, "num_beams": 4}, {}, {"max_length": 20, "num_beams": 4}),
        ({"max_length": None, "num_beams": None}, {}, {"max_length": 16, "num_beams": 1}),
        ({"max_length": 20}, {"max_length": 7}, {"max_length": 7}),
        ({"num_beams": 4}, {"num_beams": 1}, {"num_beams": 1}),
        ({"num_beams": 4}, {"num_captions": 3}, {"num_beams": 4, "num_captions": 3}),
        ({"num_beams": 4}, {"length_penalty": 2.0}, {"num_beams": 4, "length_penalty": 2.0}),
        ({"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 0}, {"no_repeat_ngram_size": 0}),
        ({"min_length": 5}, {"min_length": 0}, {"min_length": 0}),
        ({"repetition_penalty": 1.2}, {}, {"repetition_penalty": 1.2}),
        ({"bos_token_id": 7, "do_sample": True}, {}, {"sample": False}),
        ({}, {"prompt": "a photo of"}, {"prompt": "a photo of"}),
        ({}, {"max_length": 64}, {"max_length": 64}),
        ({}, {"min_length": 16}, {"min_length": 16}),
        # the model's own sampling settings are for sampling, its beams for searching
        (OF_MODEL, {}, {"top_p": None, "top_k": None, "temperature": None, "num_beams": 4, "length_penalty": 0.5}),
        (OF_MODEL, {"sample": True}, {"top_p": 0.9, "top_k": 30, "num_beams": 1, "length_penalty": None}),
        (OF_MODEL, {"sample": True, "top_p": 0.5, "top_k": 0}, {"top_p": 0.5, "top_k": 0, "temperature": 0.7}),
        (OF_MODEL, {"sample": True, "num_captions": 3}, {"num_captions": 3, "num_beams": 1}),
    ],
)
def test_the_users_options_stand_over_the_models(defaults, options, expected):
    decoding = settled(defaults, **options).as_dict()
    assert {name: decoding[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("defaults", "can", "options", "words"),
    [
        ({}, PLAIN, {"prompt": "a photo"}, "org/model takes no prompt; leave out --prompt"),
        ({}, PLAIN, {"prompt": ""}, "takes no prompt"),
        ({}, PLAIN, {"num_beams": 2}, "org/model has no beam search; leave out --num-beams"),
        ({}, PLAIN, {"sample": True}, "org/model does not sample; leave out --sample"),
        ({}, PLAIN, {"num_captions": 2}, "gives one caption an image; leave out --num-captions"),
        ({}, ABLE, {"num_captions": 2}, "--num-captions 2 needs as many beams, and the search has 1"),
        ({"num_beams": 2}, ABLE, {"num_captions": 3}, "add --num-beams 3, or --sample"),
        ({"num_beams": 4}, ABLE, {"num_captions": 3, "num_beams": 2}, "the search has 2"),
        ({}, ABLE, {"length_penalty": 1.0}, "--length-penalty needs beams"),
        ({"num_beams": 4}, ABLE, {"length_penalty": 1.0, "num_beams": 1}, "--length-penalty needs beams"),
        ({}, ABLE, {"max_length": 65}, "--max-length 65 is beyond the 64 positions of org/model; use 64 or less"),
        ({}, ABLE, {"max_length": 1}, "--max-length 1 leaves no token"),
        ({}, ABLE, {"min_length": 17}, "--min-length 17 is above --max-length 16"),
    ],
)
def test_what_cannot_work_is_refused_by_name(defaults, can, options, words):
    with pytest.raises(UsageError) as caught:
        settled(defaults, can, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("own", "given", "lengths"),
    [
        ({"max_length": 100}, {}, (64, None)),
        ({"min_length": 10}, {"max_length": 8}, (8, 8)),
        ({"min_length": 90, "max_length": 80}, {}, (64, 64)),
        ({"min_length": 5}, {"max_length": 8}, (8, 5)),
    ],
)
def test_the_models_own_lengths_give_way(own, given, lengths):
    decoding = settle(CaptionConfig(inputs=(), **given), own, ABLE, "org/model")
    assert (decoding.max_length, decoding.min_length) == lengths
