"""Why two searches of the same weights found different captions: a tie within rounding, or a fault."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from dbcap.captioning.decoding import Decoding
from dbcap.captioning.rules import Best
from dbcap.captioning.search import Special, search

TIE = 1e-5
TRIES = 128
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Rounding:
    """How far one pass of the weights may be from another."""

    score: float
    """Two captions may change places whose scores are no further apart."""
    token: float
    """Two tokens of a greedy caption may whose log-probabilities are no further apart."""
    nudge: float
    """Standard deviation of the log-probability of a token; in float32 what adds up to a score's bound at most."""


@dataclass(frozen=True)
class Verdict:
    """What is known of one caption that differs."""

    ours: float
    theirs: float
    """Scores of both captions, by a float32 pass; of greedy ones, log-probabilities where they first differ."""
    bound: float
    why: str
    """Empty where nothing explains it."""


class Judge:
    """Scores captions with one float32 pass of the weights that both searches had."""

    def __init__(self, exact: Any, engine: Any, special: Special) -> None:
        self._exact, self._engine, self._special = exact, engine, special

    def rounding(self, plain: Any, pixels: np.ndarray, captions: list[list[Tokens]], decoding: Decoding) -> Rounding:
        """Return how far transformers' own low-precision pass is from float32, over the captions that it found itself.

        Each of two scores may be off by the largest error.
        """
        if plain.dtype == torch.float32:
            return Rounding(TIE, TIE, TIE / decoding.max_length / 3)
        token, score = [], []
        for rank in range(len(captions[0])):
            chosen = [row[rank] for row in captions]
            rounded = self._values(plain, pixels, chosen, decoding)
            exact = self._values(self._exact, pixels, chosen, decoding)
            for one, two in zip(rounded, exact, strict=True):
                token.append(one - two)
                score.append(abs(_score(one, decoding) - _score(two, decoding)))
        errors = np.concatenate(token)
        return Rounding(2 * max(score), 2 * float(np.abs(errors).max()), float(np.sqrt((errors**2).mean())))

    def differences(
        self, pixels: np.ndarray, ours: list[Tokens], theirs: list[Tokens], decoding: Decoding, rounding: Rounding
    ) -> list[tuple[int, Verdict]]:
        """Judge each rank of one image's captions (3, H, W) whose tokens differ."""
        ranks = [rank for rank, (one, two) in enumerate(zip(ours, theirs, strict=True)) if one != two]
        return [(rank, self._judge(pixels, ours[rank], theirs[rank], decoding, rounding)) for rank in ranks]

    def _judge(
        self, pixels: np.ndarray, ours: Tokens, theirs: Tokens, decoding: Decoding, rounding: Rounding
    ) -> Verdict:
        one, two = self._values(self._exact, np.stack([pixels, pixels]), [ours, theirs], decoding)
        if decoding.num_beams == 1:
            place = next(place for place, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b) - 1
            bound, scores = rounding.token, (float(one[place]), float(two[place]))
        else:
            bound, scores = rounding.score, (_score(one, decoding), _score(two, decoding))
        if abs(scores[0] - scores[1]) <= bound:
            return Verdict(*scores, bound, "a tie")
        if self._reachable(pixels, {ours, theirs}, decoding, rounding):
            return Verdict(*scores, bound, "a tie on the way")
        return Verdict(*scores, bound, "")

    def _reachable(self, pixels: np.ndarray, captions: set[Tokens], decoding: Decoding, rounding: Rounding) -> bool:
        """Tell whether a float32 search finds all of these captions when its values move as rounding moves them."""
        nudged = Nudged(self._engine, rounding.nudge)
        batch = np.repeat(pixels[None], TRIES, axis=0)
        rows = search(nudged, batch, decoding, self._special, [0] * TRIES)
        return captions <= {one.tokens for row in rows for one in row}

    def _values(self, model: Any, pixels: np.ndarray, captions: list[Tokens], decoding: Decoding) -> list[np.ndarray]:
        """Return what the rules leave of the log-probability of each token: arrays (T - 1,), all fed at once."""
        longest = max(map(len, captions))
        ids = torch.tensor([[*caption, *[self._special.pad] * (longest - len(caption))] for caption in captions])
        with torch.inference_mode():
            images = torch.from_numpy(pixels).to(model.dtype)
            logits = model(pixel_values=images, decoder_input_ids=ids[:, :-1]).logits.float()
        rules = _rules(decoding, self._special)
        chosen = []
        for place in range(longest - 1):
            if decoding.num_beams == 1:
                values = rules(ids[:, : place + 1], logits[:, place]).log_softmax(-1)
            else:
                values = rules(ids[:, : place + 1], logits[:, place].log_softmax(-1))
            chosen.append(values.gather(1, ids[:, place + 1, None])[:, 0])
        whole = torch.stack(chosen, 1).numpy()
        return [row[: len(caption) - 1] for row, caption in zip(whole, captions, strict=True)]


def _score(values: np.ndarray, decoding: Decoding) -> float:
    penalty = 1.0 if decoding.length_penalty is None else decoding.length_penalty
    return float(values.sum(dtype=np.float64) / len(values) ** penalty)


def _rules(decoding: Decoding, special: Special) -> LogitsProcessorList:
    rules = LogitsProcessorList()
    if decoding.repetition_penalty is not None:
        rules.append(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
    if decoding.no_repeat_ngram_size:
        rules.append(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram_size))
    if decoding.min_length:
        rules.append(MinLengthLogitsProcessor(decoding.min_length, list(special.ends)))
    return rules


class Nudged:
    """An engine whose log-probabilities are off, by as much in every row anew."""

    leaves = False

    def __init__(self, engine: Any, deviation: float) -> None:
        self._engine, self._deviation, self._random = engine, deviation, np.random.default_rng(0)
        self.encode, self.reorder = engine.encode, engine.reorder

    def step(self, tokens: np.ndarray, cache: Any, best: int, watched: np.ndarray) -> Best:
        """Decode one more token of each row, see `search.Engine`."""
        told = self._engine.step(tokens, cache, best + 16, watched)
        moved, also = (
            self._random.normal(0, self._deviation, ids.shape).astype(np.float32) for ids in (told[0], watched)
        )
        values = told.logprobs + moved
        order = np.argsort(-values, axis=1, kind="stable")[:, :best]
        parts = (np.take_along_axis(part, order, 1) for part in (told.tokens, told.logits + moved, values))
        return Best(*parts, told.watched_logits + also, told.watched_logprobs + also)
