"""How near captions are to what people wrote of the same images: BLEU-1..4, ROUGE-L and CIDEr-D, in plain Python.

They follow the evaluation code of COCO captions (pycocoevalcap), down to its constants, so that the figures stand
beside published ones. Two things are ours. The tokeniser is a regular expression, where COCO's is Stanford's in Java.
And a caption without a word scores 0, where COCO's ROUGE-L gives it 1 if a reference has no word either.

All take one candidate and one or more references of each image: texts as they are, for each function tokenises. A
reference that is given twice counts twice in CIDEr-D, which is a mean over the references; BLEU and ROUGE-L take the
best of them. Figures over few images do not compare with those over many, least of all those of CIDEr-D.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

from dbcap.errors import UsageError

Words = list[str]
Grams = Counter[tuple[str, ...]]

ORDERS = 4
"""n-grams of 1 to 4 words."""
TINY, SMALL = 1e-15, 1e-9
"""What COCO's BLEU adds to numerators and denominators: no division by 0, and a missing order is not quite 0."""
BETA = 1.2
"""How much more ROUGE-L values recall than precision."""
SIGMA = 6.0
"""How fast CIDEr-D falls with the difference of lengths, in words."""

# ---- words

_CLITIC = "'(?:s|m|d|ll|re|ve)"
_ENDING = rf"(?:n't|{_CLITIC})"
_SYMBOL = r"$%&#@*+=/<>|~^\\"
_CHAR = rf"[^\s{_SYMBOL}.,?!:;'\"`()\[\]{{}}«»“”„–—…-]"
_SPLIT = re.compile(rf"(?:(?<={_CHAR}){_ENDING}|(?<=\bcan)not)(?={_ENDING}*(?!{_CHAR}))")  # I'd've is I 'd 've
_TOKEN = re.compile(
    rf"{_CLITIC}(?!{_CHAR})"
    rf"|{_CHAR}(?:{_CHAR}|['-](?={_CHAR})|(?<=\d)[.,:/](?=\d))*"  # o'clock, black-and-white, 3.5, 10:30
    rf"|[{_SYMBOL}]"
)


def tokenise(text: str) -> Words:
    """Return the words of a text, in lower case and without punctuation, nearly as COCO's tokeniser does.

    As in the Penn Treebank, clitics are words (`dog's` is `dog` and `'s`, `isn't` is `is` and `n't`), hyphens within a
    word and the points within a number stay, and symbols such as `&` are words. Unlike there, brackets are removed and
    an abbreviation (`U.S.`) is its letters. Words joined by spaces are the same words again.
    """
    # Composed, so that an accent does not depend on how the text was typed.
    plain = unicodedata.normalize("NFC", text.lower()).replace("’", "'").replace("‘", "'")
    return _TOKEN.findall(_SPLIT.sub(r" \g<0>", plain))


class _Image(NamedTuple):
    """One image, in words."""

    candidate: Words
    references: list[Words]


def _images(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[_Image]:
    """Check what a metric is given, and tokenise it."""
    if len(candidates) != len(references):
        raise UsageError(
            f"{len(candidates)} captions and references of {len(references)} images", "give one caption for each image"
        )
    if not candidates:
        raise UsageError("no captions to score", "give at least one, with its references")
    for number, texts in enumerate(references, 1):
        # A text is a sequence of texts too: its letters would pass for references.
        if isinstance(texts, str) or not texts:
            raise UsageError(f"image {number} has no list of references", "give one or more texts for each image")
    pairs = zip(candidates, references, strict=True)
    return [_Image(tokenise(candidate), [tokenise(text) for text in texts]) for candidate, texts in pairs]


def _grams(words: Words) -> list[Grams]:
    """Count the n-grams of each order."""
    return [
        Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))
        for order in range(1, ORDERS + 1)
    ]


# ---- BLEU


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, float, float, float]:
    """Return BLEU-1 to BLEU-4 of all images together, each from 0 to 1.

    BLEU-n is BP * (p_1 * ... * p_n)^(1/n): p_k is the share of the candidates' k-grams that a reference of the same
    image holds, each at most as often as the reference that holds it most. BP is exp(1 - r/c) if the candidates' c
    words are fewer than the r words of the references nearest in length (the shorter of two), else 1.
    Papineni et al. 2002, "BLEU: a Method for Automatic Evaluation of Machine Translation", section 2.3.

    `candidates` holds N texts, `references` N lists of one or more texts. Raises UsageError for other shapes or N = 0.
    """
    right, all_ = [0] * ORDERS, [0] * ORDERS
    length = nearest = 0
    for candidate, texts in _images(candidates, references):
        length += len(candidate)
        nearest += min((abs(len(text) - len(candidate)), len(text)) for text in texts)[1]
        counted = [_grams(text) for text in texts]
        for order, grams in enumerate(_grams(candidate)):
            most = reduce(or_, (of_text[order] for of_text in counted))
            right[order] += (grams & most).total()
            all_[order] += grams.total()
    ratio = (length + TINY) / (nearest + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    precisions = [(hits + TINY) / (count + SMALL) for hits, count in zip(right, all_, strict=True)]
    one, two, three, four = (math.prod(precisions[:n]) ** (1 / n) * brevity for n in range(1, ORDERS + 1))
    return one, two, three, four


# ---- ROUGE-L


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean over the images of ROUGE-L, from 0 to 1.

    Of one image it is (1 + b^2) * P * R / (R + b^2 * P), b = 1.2: P is the longest common subsequence over the
    candidate's length, R over the reference's. As in COCO's code, P and R are each the best of all references, so
    that they may come from two. Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.

    `candidates` holds N texts, `references` N lists of one or more texts. Raises UsageError for other shapes or N = 0.
    """
    images = _images(candidates, references)
    return math.fsum(_rouge_l_of(image) for image in images) / len(images)


def _rouge_l_of(image: _Image) -> float:
    common = [_longest_common(image.candidate, text) for text in image.references]
    if not any(common):
        return 0.0
    precision = max(common) / len(image.candidate)
    recall = max(shared / len(text) for shared, text in zip(common, image.references, strict=True) if text)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(left: Words, right: Words) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for word in left:
        above, row = row, [0]
        for column, other in enumerate(right):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[column]))
    return row[-1]


# ---- CIDEr-D


class _Vector(NamedTuple):
    """A text as weights of its n-grams, one dictionary and one norm of each order."""

    weights: list[dict[tuple[str, ...], float]]
    norms: list[float]
    length: int


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean over the images of CIDEr-D, from 0 to 10.

    Of one image it is the mean over its references and over n = 1 to 4 of
    10 * exp(-(l_c - l_r)^2 / (2 * 6^2)) * sum(min(c, r) * r) / (|c| * |r|): c and r weigh each n-gram of candidate and
    reference by its count times log(N / number of images of which a reference holds it), l are their lengths.
    Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation", arXiv:1411.5726, sections 4 and 6.

    `candidates` holds N texts, `references` N lists of one or more texts. Raises UsageError for other shapes, and for
    N below 2: of one image each weight is log(1), so that the score would be 0 whatever the caption says.
    """
    images = _images(candidates, references)
    if len(images) < 2:
        raise UsageError("CIDEr-D of one image is 0 whatever its caption says", "score 2 images or more together")
    spread: Grams = Counter()
    for image in images:
        spread.update({gram for text in image.references for grams in _grams(text) for gram in grams})
    scores = []
    for candidate, texts in images:
        own = _vector(candidate, spread, len(images))
        scores.append(math.fsum(_similarity(own, _vector(text, spread, len(images))) for text in texts) / len(texts))
    return math.fsum(scores) / len(scores) * 10


def _vector(words: Words, spread: Grams, images: int) -> _Vector:
    """Weigh the n-grams of a text; one that no reference holds counts as if one image's did."""
    weights = [
        {gram: count * (math.log(images) - math.log(max(1, spread[gram]))) for gram, count in grams.items()}
        for grams in _grams(words)
    ]
    norms = [math.hypot(*of_order.values()) for of_order in weights]
    # COCO's code takes the number of word pairs for the length: no word is as long as one.
    return _Vector(weights, norms, max(len(words) - 1, 0))


def _similarity(own: _Vector, other: _Vector) -> float:
    """Return the mean over the orders, from 0 to 1."""
    total = 0.0
    for grams, weights, norm, other_norm in zip(own.weights, other.weights, own.norms, other.norms, strict=True):
        if norm and other_norm:
            shared = math.fsum(
                min(grams[gram], weights[gram]) * weights[gram] for gram in grams.keys() & weights.keys()
            )
            total += shared / (norm * other_norm)
    return total / ORDERS * math.exp(-((own.length - other.length) ** 2) / (2 * SIGMA**2))
