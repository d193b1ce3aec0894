"""Rules about the next token, applied to the few best candidates of each row. Plain numpy, no torch.

R rows, K candidates, W watched tokens. A rule touches few tokens of a row (those that stand in it, the end token). So
an engine hands over the K best of the whole vocabulary and the values of the W tokens that a rule may touch, and
`merge` makes one list of both: its best K - W are what the rule would have left of the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]

NONE = -1
"""Stands where a row has fewer watched tokens than others."""


class Best(NamedTuple):
    """What a decoder says of the next token of R rows."""

    tokens: Ids
    """(R, K), best first."""
    logits: Values
    """(R, K), as the decoder gives them."""
    logprobs: Values
    """(R, K), normalised over the whole vocabulary, in float32."""
    watched_logits: Values
    """(R, W), of the tokens that were asked for; of no meaning where `NONE` was."""
    watched_logprobs: Values
    """(R, W)."""


def penalise(values: Values, penalty: float) -> Values:
    """Make tokens that stand already less likely (penalty above 1) or likelier (below); CTRL, arXiv:1909.05858, 4.1."""
    factor = np.float32(penalty)
    return np.where(values < 0, values * factor, values / factor)


def repeats(row: Sequence[int], size: int) -> list[int]:
    """Return the tokens that would complete a run of `size` tokens that stands in the row already.

    Blocking of repeated n-grams as in Paulus et al., arXiv:1705.04304, section 2.5.
    """
    last = list(row[len(row) - size + 1 :])
    return [row[end] for end in range(size - 1, len(row)) if list(row[end - size + 1 : end]) == last]


def merge(tokens: Ids, values: Values, watched: Ids, changed: Values) -> tuple[Ids, Values]:
    """Put the `changed` values (R, W) of the watched tokens in place of those among the candidates (R, K).

    Returns tokens and values (R, K + W), unordered; what stands twice or is `NONE` is impossible (minus infinity).
    """
    twice = (tokens[:, :, None] == watched[:, None, :]).any(-1)
    kept = np.where(twice, np.float32(-np.inf), values)
    added = np.where(watched == NONE, np.float32(-np.inf), changed)
    return np.concatenate([tokens, np.maximum(watched, 0)], axis=1), np.concatenate([kept, added], axis=1)


def warp(values: Values, temperature: float, top_k: int, top_p: float) -> npt.NDArray[np.float64]:
    """Return the probabilities of candidates for sampling; values (K,) sorted, best first.

    Temperature, then the `top_k` best (0: all; arXiv:1805.04833), then the smallest set of the best that together have
    a probability of at least `top_p` (arXiv:1904.09751).
    """
    scaled = values.astype(np.float64) / temperature
    if top_k:
        scaled = scaled[:top_k]
    chances: npt.NDArray[np.float64] = np.exp(scaled - scaled[0])
    chances /= chances.sum()
    if top_p < 1:
        before = np.cumsum(chances) - chances
        chances = np.where(before < top_p, chances, 0.0)
        chances[0] = max(chances[0], np.finfo(np.float64).tiny)
        chances /= chances.sum()
    return chances
