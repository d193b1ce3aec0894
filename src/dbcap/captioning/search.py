"""The search for captions: greedy, beams and sampling over any engine. Plain numpy, no torch.

An image takes `width` rows of a batch: its beams, or the candidates drawn for it. R rows, K candidates of each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from dbcap.captioning import rules
from dbcap.captioning.decoding import Decoding
from dbcap.captioning.rules import Best, Ids, Values

NEVER = np.float32(-1e9)
"""The score of a beam that does not exist, in transformers' search as here."""
MIN_ROWS = 4
"""Float32 products of fewer rows differ in the last bits from those of four and more."""
LEAVE_FROM = 0.75
"""Rows leave once no more than this share would stay: a copy of the caches costs about one step."""


MOST_DIGITS = 290
"""Of a length penalty: a sum of log-probabilities divided by 10 ** -290 is still a number."""

Scores = npt.NDArray[np.float64]


class Engine(Protocol):
    """The two halves of a captioner. What `encode` returns is the engine's own business."""

    @property
    def leaves(self) -> bool:
        """Whether finished images may leave the batch: only where a row's values depend on no other row's being there.

        In bfloat16 and float16 kernels round differently at another number of rows, so the batch keeps its shape.
        """

    def encode(self, pixels: npt.NDArray[np.float32], width: int, length: int) -> Any:
        """Encode pixels (B, 3, H, W) and return a cache for B x `width` rows of up to `length` tokens."""

    def step(self, tokens: Ids, cache: Any, best: int, watched: Ids) -> Best:
        """Decode one more token of each row (R,), and return the `best` next ones and the watched (R, W)."""

    def reorder(self, cache: Any, rows: Ids) -> None:
        """Put old row `rows[i]` at row i. Rows stay with their image; where there are fewer, whole images left."""


class Special(NamedTuple):
    """Tokens with a meaning."""

    start: int
    ends: tuple[int, ...]
    pad: int


class Found(NamedTuple):
    """One caption as tokens, from the start token to the end token, and its score."""

    tokens: tuple[int, ...]
    score: float


def search(
    engine: Engine, pixels: npt.NDArray[np.float32], decoding: Decoding, special: Special, seeds: Sequence[int]
) -> list[list[Found]]:
    """Caption pixels (B, 3, H, W); returns B lists of `num_captions`, best first. One seed an image, for sampling.

    A list is shorter where the rules leave no more captions than that, and never empty.

    A score is what beam search ranks by, the log-probability over length ** length_penalty; without beams the mean
    log-probability of the tokens made.
    """
    if decoding.num_beams > 1:
        return _Beams(engine, pixels, decoding, special).run()
    return _Rows(engine, pixels, decoding, special, seeds).run()


def enough_rows(pixels: npt.NDArray[np.float32], width: int) -> npt.NDArray[np.float32]:
    """Repeat the last image of pixels (B, 3, H, W) until there are `MIN_ROWS` rows, `width` of them an image."""
    missing = -(-MIN_ROWS // width) - len(pixels)
    return pixels if missing <= 0 else np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)])


class _Search(ABC):
    """What all searches share: the batch, its rows, and the rules."""

    def __init__(
        self, engine: Engine, pixels: npt.NDArray[np.float32], decoding: Decoding, special: Special, width: int
    ) -> None:
        self._engine, self._decoding, self._special = engine, decoding, special
        self._width = width
        images = len(pixels)
        self._images = np.arange(images)
        """Which image stands at each place of the batch."""
        self._found: list[list[Found]] = [[] for _ in range(images)]
        self._length = 1
        self._tokens = np.full((images * width, decoding.max_length), special.pad, dtype=np.int64)
        self._tokens[:, 0] = special.start
        self._cache = engine.encode(pixels, width, decoding.max_length - 1)

    def run(self) -> list[list[Found]]:
        """Search until every image is done or as long as a caption may be."""
        while self._length < self._decoding.max_length:
            done = self._advance()
            if done.all():
                break
            if self._engine.leaves and self._length < self._decoding.max_length:
                self._leave(done)
        self._collect(np.ones(len(self._images), bool))
        return self._found

    @abstractmethod
    def _advance(self) -> npt.NDArray[np.bool_]:
        """Add a token to every row; returns which images (B,) are done."""

    @abstractmethod
    def _collect(self, places: npt.NDArray[np.bool_]) -> None:
        """Note what was found for the images at these places (B,)."""

    @abstractmethod
    def _keep(self, places: Ids) -> None:
        """Drop what belongs to images at other places than these."""

    def _rows_of(self, places: Ids) -> Ids:
        """Return the rows of the images at these places."""
        rows: Ids = (places[:, None] * self._width + np.arange(self._width)).ravel()
        return rows

    def _leave(self, done: npt.NDArray[np.bool_]) -> None:
        """Let finished images leave the batch, where that makes it so much smaller that a copy pays."""
        least = -(-MIN_ROWS // self._width)
        if max(least, (~done).sum()) > LEAVE_FROM * len(done):
            return
        self._collect(done)
        staying = np.flatnonzero(~done)
        # Finished ones that fill up the rows are collected twice, with the same result.
        places = np.sort(np.concatenate([staying, np.flatnonzero(done)[: max(0, least - len(staying))]]))
        rows = self._rows_of(places)
        self._engine.reorder(self._cache, rows)
        self._images, self._tokens = self._images[places], self._tokens[rows]
        self._keep(places)

    def _candidates(self, best: int, *, normalised: bool) -> tuple[Ids, Values, Values]:
        """Return the tokens (R, K), their values under the rules and their log-probabilities, best value first.

        The values are logits, or with `normalised` log-probabilities.
        """
        so_far = self._tokens[:, : self._length]
        watched, banned = self._watched(so_far)
        found = self._engine.step(so_far[:, -1], self._cache, best + watched.shape[1], watched)
        if not watched.shape[1]:
            return found.tokens, found.logprobs if normalised else found.logits, found.logprobs
        changed = found.watched_logprobs if normalised else found.watched_logits
        penalty = self._decoding.repetition_penalty or 1.0
        if penalty != 1:
            stands = (watched[:, :, None] == so_far[:, None, :]).any(-1)
            changed = np.where(stands, rules.penalise(changed, penalty), changed)
        changed = np.where(banned, np.float32(-np.inf), changed)
        values = found.logprobs if normalised else found.logits
        tokens, values = rules.merge(found.tokens, values, watched, changed)
        logprobs = np.concatenate([found.logprobs, found.watched_logprobs], axis=1)
        order = np.argsort(-values, axis=1, kind="stable")[:, :best]
        return tuple(np.take_along_axis(array, order, 1) for array in (tokens, values, logprobs))  # type: ignore[return-value]

    def _watched(self, so_far: Ids) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """Return the tokens (R, W) that a rule touches, and which of them it forbids."""
        decoding, rows = self._decoding, len(so_far)
        touched: list[set[int]] = [set() for _ in range(rows)]
        forbidden: list[set[int]] = [set() for _ in range(rows)]
        if (decoding.repetition_penalty or 1.0) != 1:
            touched = [set(row) for row in so_far.tolist()]
        if decoding.no_repeat_ngram_size:
            forbidden = [set(rules.repeats(row, decoding.no_repeat_ngram_size)) for row in so_far.tolist()]
        if self._length < (decoding.min_length or 0):
            for row in forbidden:
                row.update(self._special.ends)
        lists = [sorted(one | other) for one, other in zip(touched, forbidden, strict=True)]
        most = max(map(len, lists))
        watched = np.array([row + [rules.NONE] * (most - len(row)) for row in lists], dtype=np.int64).reshape(
            rows, most
        )
        banned = np.array([[token in no for token in row] for row, no in zip(watched.tolist(), forbidden, strict=True)])
        return watched, banned.reshape(rows, most)

    def _ends(self, tokens: Ids) -> npt.NDArray[np.bool_]:
        return np.isin(tokens, self._special.ends)


class _Rows(_Search):
    """Greedy search, or sampling: each row for itself."""

    def __init__(
        self,
        engine: Engine,
        pixels: npt.NDArray[np.float32],
        decoding: Decoding,
        special: Special,
        seeds: Sequence[int],
    ) -> None:
        width = decoding.num_captions if decoding.sample else 1
        super().__init__(engine, pixels, decoding, special, width)
        self._random = [np.random.default_rng((seed, number)) for seed in seeds for number in range(width)]
        self._lengths = np.zeros(len(self._tokens), dtype=np.int64)
        """Of the rows that have ended, else 0."""
        self._sums = np.zeros(len(self._tokens), dtype=np.float32)

    def _advance(self) -> npt.NDArray[np.bool_]:
        tokens, values, logprobs = self._candidates(self._enough(), normalised=False)
        chosen = self._draw(values) if self._decoding.sample else np.zeros(len(tokens), dtype=np.int64)
        running = self._lengths == 0
        rows = np.arange(len(tokens))
        chosen_tokens = np.where(running, tokens[rows, chosen], self._special.pad)
        self._tokens[:, self._length] = chosen_tokens
        self._sums += np.where(running, logprobs[rows, chosen], np.float32(0))
        self._length += 1
        self._lengths[running & self._ends(chosen_tokens)] = self._length
        return np.asarray((self._lengths > 0).reshape(-1, self._width).all(1))

    def _enough(self) -> int:
        """Return how many candidates a row needs."""
        if not self._decoding.sample:
            return 1
        top_k = 50 if self._decoding.top_k is None else self._decoding.top_k
        return top_k or np.iinfo(np.int32).max

    def _draw(self, values: Values) -> Ids:
        """Return the place of the drawn candidate in each row, by inverting the distribution function."""
        decoding = self._decoding
        drawn = []
        for row, random in zip(values, self._random, strict=True):
            chances = rules.warp(row, decoding.temperature or 1.0, 0, decoding.top_p or 1.0)
            drawn.append(min(int(np.searchsorted(np.cumsum(chances), random.random(), "right")), len(chances) - 1))
        return np.array(drawn, dtype=np.int64)

    def _collect(self, places: npt.NDArray[np.bool_]) -> None:
        for place in np.flatnonzero(places):
            found = []
            for row in self._rows_of(np.array([place])):
                length = int(self._lengths[row]) or self._length
                score = float(self._sums[row]) / (length - 1)
                found.append(Found(tuple(self._tokens[row, :length].tolist()), score))
            self._found[self._images[place]] = sorted(found, key=lambda one: -one.score)

    def _keep(self, places: Ids) -> None:
        rows = self._rows_of(places)
        self._lengths, self._sums = self._lengths[rows], self._sums[rows]
        self._random = [self._random[row] for row in rows]


@dataclass
class _Ended:
    """The best ended beams of each image: (B, k), and tokens (B, k, max_length)."""

    tokens: Ids
    scores: Scores
    lengths: Ids  # 0 where there is none yet

    def merge(self, tokens: Ids, scores: Scores, lengths: Ids) -> _Ended:
        """Return the k best of these and new ones (B, n)."""
        scores = np.concatenate([self.scores, scores], axis=1)
        order = _best(scores, self.scores.shape[1])
        return _Ended(
            _take(np.concatenate([self.tokens, tokens], axis=1), order),
            _take(scores, order),
            _take(np.concatenate([self.lengths, lengths], axis=1), order),
        )

    def at(self, places: Any) -> _Ended:
        """Return those of the images at these places, or of the one at this place."""
        return _Ended(self.tokens[places], self.scores[places], self.lengths[places])


class _Beams(_Search):
    """Beam search with transformers' bookkeeping: of 2k candidates an image k go on, and the k best ended are kept."""

    def __init__(self, engine: Engine, pixels: npt.NDArray[np.float32], decoding: Decoding, special: Special) -> None:
        super().__init__(engine, pixels, decoding, special, decoding.num_beams)
        images, beams = len(pixels), decoding.num_beams
        self._keeps = max(2, 1 + len(special.ends)) * beams
        self._scores = np.zeros((images, beams), dtype=np.float32)
        self._scores[:, 1:] = NEVER  # all beams start alike: only the first counts
        self._ended = _Ended(
            np.full((images, beams, decoding.max_length), special.pad, dtype=np.int64),
            np.full((images, beams), -np.inf),
            np.zeros((images, beams), dtype=np.int64),
        )
        self._improvable = np.ones(images, dtype=bool)

    def _advance(self) -> npt.NDArray[np.bool_]:
        images, beams, decoding = len(self._images), self._width, self._decoding
        tokens, values, _ = self._candidates(self._keeps, normalised=True)
        sums = (values.reshape(images, beams, -1) + self._scores[:, :, None]).reshape(images, -1)
        self._end_stuck(sums)
        order = _best(sums, self._keeps)  # (B, n): the continuations that are looked at
        sums = _take(sums, order)
        parents = order // values.shape[1]
        longer = _take(self._tokens.reshape(images, beams, -1), parents)
        longer[:, :, self._length] = _take(tokens.reshape(images, -1), order)
        self._length += 1
        ending = self._ends(longer[:, :, self._length - 1]) | (self._length >= decoding.max_length)
        self._note(longer, sums, ending)

        going = _best(np.where(ending, sums + NEVER, sums), beams)
        self._scores = _take(np.where(ending, sums + NEVER, sums), going)
        self._tokens = _take(longer, going).reshape(images * beams, -1)
        self._look_ahead()
        done = self._done()
        if self._length < decoding.max_length and not done.all():
            rows = _take(parents, going) + np.arange(images)[:, None] * beams
            self._engine.reorder(self._cache, rows.ravel())
        return done

    def _note(self, tokens: Ids, sums: Values, ending: npt.NDArray[np.bool_]) -> None:
        """Keep what ends now, of the k best continuations, where the image is not done."""
        counts = ending & (np.arange(sums.shape[1]) < self._width) & ~self._done()[:, None]
        self._end(tokens, sums, counts)

    def _end_stuck(self, sums: Values) -> None:
        """End the beams as they stand where the rules leave no continuation (B, n) possible."""
        stuck = ~np.isfinite(sums).any(1) & ~self._done()
        if stuck.any():
            beams = self._tokens.reshape(len(stuck), self._width, -1)
            self._end(beams, self._scores, np.repeat(stuck[:, None], self._width, 1))
            self._improvable &= ~stuck

    def _end(self, tokens: Ids, sums: Values, counts: npt.NDArray[np.bool_]) -> None:
        """Keep those of these beams (B, n) that count, as long as they are now."""
        counts = counts & np.isfinite(sums)
        scores = np.where(counts, sums, np.float32(0)) / _weight(self._length - 1, self._penalty)
        self._ended = self._ended.merge(tokens, np.where(counts, scores, -np.inf), np.where(counts, self._length, 0))

    def _done(self) -> npt.NDArray[np.bool_]:
        """Tell which images (B,) take no more."""
        full = (self._ended.lengths > 0).all(1)
        return ~self._improvable | (full & (self._decoding.early_stopping is True))

    @property
    def _penalty(self) -> float:
        return 1.0 if self._decoding.length_penalty is None else self._decoding.length_penalty

    def _look_ahead(self) -> None:
        """Note which images no running beam can improve, by transformers' estimate of the best score it may reach."""
        longest = self._decoding.early_stopping == "never" and self._penalty > 0
        length = (self._decoding.max_length if longest else self._length) - 1
        reachable = self._scores[:, 0] / _weight(length, self._penalty)
        self._improvable &= reachable > self._ended.scores.min(1)

    def _collect(self, places: npt.NDArray[np.bool_]) -> None:
        for place in np.flatnonzero(places):
            ended = self._ended.at(place)
            self._found[self._images[place]] = [
                Found(tuple(tokens[:length].tolist()), float(score))
                for tokens, length, score in zip(ended.tokens, ended.lengths, ended.scores, strict=True)
                if length
            ][: self._decoding.num_captions]

    def _keep(self, places: Ids) -> None:
        self._scores, self._improvable = self._scores[places], self._improvable[places]
        self._ended = self._ended.at(places)


def _weight(length: int, penalty: float) -> np.float64:
    """Return length ** penalty, within what float64 can hold whatever the user asks for."""
    exponent = penalty * math.log10(length)
    weight = length**penalty if abs(exponent) < MOST_DIGITS else 10.0 ** math.copysign(MOST_DIGITS, exponent)
    return np.float64(weight)  # of numpy's own kind: a plain float would leave what it divides in float32


def _best(scores: Values | Scores, count: int) -> Ids:
    """Return the places of the highest scores (B, count) of (B, n); of equal ones the first."""
    order: Ids = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return order


def _take(array: npt.NDArray[Any], places: Ids) -> npt.NDArray[Any]:
    """Return array (B, n, ...) at places (B, m) of its second axis: (B, m, ...)."""
    return array[np.arange(len(array))[:, None], places]
