"""BLEU, ROUGE-L and CIDEr-D against the scores of COCO's evaluation code, and what holds of them for any captions."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbcap.captioning.metrics import bleu, cider_d, rouge_l, tokenise
from dbcap.errors import UsageError

# Scores of pycocoevalcap, which is no dependency: the file says which version, and how they were made.
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "caption-metrics.json").read_text("utf-8"))
CASES = [pytest.param(case, id=case["name"]) for case in GOLDEN["cases"]]

DOG = ["A brown dog runs over the green grass.", "a dog is running in a field"]
CAT = ["A cat sleeps on a red couch.", "a cat lying on top of a couch"]

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
TRICKY = st.lists(
    st.sampled_from(["n't", "'s", "'", "-", ".", "7", ":", "/", "can", "not", "x", " ", "é", "ß", "&", "("])
)
CAPTION = st.lists(st.sampled_from(["a", "dog", "cat", "runs", "on", "grass", "red"]), max_size=8).map(" ".join)
WORDED = CAPTION.filter(bool)
IMAGES = st.lists(st.tuples(CAPTION, st.lists(CAPTION, min_size=1, max_size=3)), min_size=2, max_size=5)
Images = list[tuple[str, list[str]]]


def scores(images: Images) -> list[float]:
    """Return BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D."""
    candidates, references = [one for one, _ in images], [texts for _, texts in images]
    return [*bleu(candidates, references), rouge_l(candidates, references), cider_d(candidates, references)]


# ---- as the reference implementation


def test_the_fixture_says_whose_scores_it_holds():
    assert (GOLDEN["implementation"], GOLDEN["version"]) == ("pycocoevalcap", "1.2")
    assert len(CASES) >= 8


@pytest.mark.parametrize("case", CASES)
def test_the_fixture_is_tokenised_already(case: dict[str, Any]):
    texts = [*case["candidates"], *(text for texts in case["references"] for text in texts)]
    assert [" ".join(tokenise(text)) for text in texts] == texts


@pytest.mark.parametrize("case", CASES)
def test_bleu_as_the_reference_implementation(case: dict[str, Any]):
    assert bleu(case["candidates"], case["references"]) == pytest.approx(tuple(case["bleu"]), rel=0, abs=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_rouge_l_as_the_reference_implementation(case: dict[str, Any]):
    assert rouge_l(case["candidates"], case["references"]) == pytest.approx(case["rouge_l"], rel=0, abs=1e-9)


@pytest.mark.parametrize("case", [case for case in CASES if case.id != "one image"])
def test_cider_d_as_the_reference_implementation(case: dict[str, Any]):
    assert cider_d(case["candidates"], case["references"]) == pytest.approx(case["cider_d"], rel=0, abs=1e-9)


def test_case_and_punctuation_do_not_count():
    plain = [("a dog 's ball", ["a dog 's ball is red"]), ("two cats", ["two cats sleep", "cats"])]
    typed = [("A dog’s ball!", ['"A dog\'s ball" is (red).']), ("Two cats...", ["Two cats; sleep", "-- cats --"])]
    assert scores(typed) == scores(plain)


# ---- words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ""),
        (" .,?!:;'\"`()[]{}-–—…“”„«» ", ""),
        ("A Dog,\tand\na CAT.", "a dog and a cat"),
        ("dog's dogs' it’s I'm they'll we've you're he'd", "dog 's dogs it 's i 'm they 'll we 've you 're he 'd"),
        ("isn't can't cannot DON’T I'd've", "is n't ca n't can not do n't i 'd 've"),
        ("'quoted' ‘words’ o'clock rock'n'roll", "quoted words o'clock rock'n'roll"),
        ("a black-and-white photo - well--known -x x-", "a black-and-white photo well known x x"),
        ("3.5 1,000 10:30 1/2 5. .5 2nd", "3.5 1,000 10:30 1/2 5 5 2nd"),
        ("salt&pepper $5 50% #1 and/or", "salt & pepper $ 5 50 % # 1 and / or"),
        ("Straße CAFÉ cafe\u0301 一只狗 हिन्दी 🐕", "straße café café 一只狗 हिन्दी 🐕"),
    ],
)
def test_words_of_a_text(text: str, words: str):
    assert tokenise(text) == words.split()


@given(TEXT | TRICKY.map("".join))
def test_words_are_words_again(text: str):
    words = tokenise(text)
    assert tokenise(" ".join(words)) == words
    assert not any(word.strip() != word or not word for word in words)


# ---- what holds of any captions


@given(IMAGES)
def test_scores_are_within_their_bounds(images: Images):
    *shares, cider = scores(images)
    assert all(0 <= share <= 1 for share in shares)
    assert 0 <= cider <= 10 + 1e-9


@given(IMAGES, st.randoms(use_true_random=False))
def test_the_order_of_images_and_of_references_does_not_matter(images: Images, shuffler: random.Random):
    turned = [(candidate, shuffler.sample(texts, len(texts))) for candidate, texts in images]
    shuffler.shuffle(turned)
    assert scores(turned) == pytest.approx(scores(images), rel=1e-12, abs=1e-15)


@given(st.lists(st.tuples(WORDED, st.lists(CAPTION, max_size=2)), min_size=1, max_size=4))
def test_captions_that_are_a_reference_are_perfect(images: Images):
    candidates, references = [one for one, _ in images], [[*texts, one] for one, texts in images]
    longest = max(len(one.split()) for one in candidates)
    found = bleu(candidates, references)
    # Without an n-gram of an order, COCO's constants make that order 1e-6 of 1.
    assert found[: min(longest, 4)] == pytest.approx((1.0,) * min(longest, 4), abs=1e-8)
    assert all(score < 0.04 for score in found[longest:])
    assert rouge_l(candidates, references) == pytest.approx(1, abs=1e-12)


def test_captions_that_are_the_only_reference_have_the_highest_cider_d():
    assert cider_d([DOG[0], CAT[0]], [DOG[:1], CAT[:1]]) == pytest.approx(10)
    assert cider_d([DOG[0], CAT[0]], [DOG, CAT]) < 10


@given(
    st.lists(st.lists(CAPTION, min_size=1, max_size=3), min_size=2, max_size=4), st.sampled_from(["", " ", "?!", "\n"])
)
def test_an_empty_caption_scores_nothing(references: list[list[str]], empty: str):
    assert scores([(empty, texts) for texts in references]) == [0.0] * 6


def test_one_empty_caption_leaves_the_others_their_scores():
    full, half = scores([(DOG[0], DOG[:1]), (CAT[0], CAT[:1])]), scores([(DOG[0], DOG[:1]), ("", CAT[:1])])
    assert half[4:] == pytest.approx([full[4] / 2, full[5] / 2])
    assert all(0 < less < more for less, more in zip(half[:4], full[:4], strict=True))


def test_a_reference_given_twice_counts_twice_in_cider_d_alone():
    once = scores([(DOG[0], DOG), (CAT[0], CAT)])
    twice = scores([(DOG[0], [*DOG, DOG[1]]), (CAT[0], CAT)])
    assert twice[:5] == once[:5]
    assert twice[5] < once[5]


# ---- errors


@pytest.mark.parametrize("metric", [bleu, rouge_l, cider_d])
@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ([], [], "no captions to score; give at least one, with its references"),
        (["a dog"], [DOG, CAT], "1 captions and references of 2 images; give one caption for each image"),
        (DOG, [DOG], "2 captions and references of 1 images; give one caption for each image"),
        (DOG, [DOG, []], "image 2 has no list of references; give one or more texts for each image"),
        (DOG, CAT, "image 1 has no list of references; give one or more texts for each image"),
    ],
)
def test_what_cannot_be_scored(metric: Callable[..., Any], candidates: list[str], references: Any, message: str):
    with pytest.raises(UsageError) as caught:
        metric(candidates, references)
    assert str(caught.value) == message


def test_cider_d_of_one_image_is_refused():
    with pytest.raises(UsageError) as caught:
        cider_d(DOG[:1], [DOG])
    assert str(caught.value) == "CIDEr-D of one image is 0 whatever its caption says; score 2 images or more together"
