"""What a captioner's files say about how it captions: its special tokens and its own decoding settings. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dbcap.captioning.search import Special
from dbcap.errors import ModelError
from dbcap.models.layout import read_object

GENERATION = "generation_config.json"
_NUMBERS = (
    *("num_beams", "max_length", "min_length", "max_new_tokens", "min_new_tokens", "length_penalty"),
    *("no_repeat_ngram_size", "repetition_penalty", "top_p", "top_k", "temperature"),
)
_AFTER_PADDING = (
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"),
    *("camembert", "data2vec-text", "xmod"),
)
"""Types of decoders whose first position comes after that of the padding token, in the order of its number."""


def decoding_defaults(folder: Path, model: str) -> dict[str, Any]:
    """Read generation_config.json itself: the library would fill in defaults of its own, which are not the model's.

    Raises ModelError for a setting that is no number where one is needed.
    """
    values = read_object(folder / GENERATION)
    for name in _NUMBERS:
        value = values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ModelError(f"the {GENERATION} of {model} says {name} = {value!r}, which is no number")
    return own_lengths(values)


def own_lengths(values: dict[str, Any]) -> dict[str, Any]:
    """Say lengths as dbcap does: with the start token. As in transformers, new tokens outdo a whole length."""
    for length, made in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if values.get(made):
            values[length] = values[made] + 1
    return values


def positions_of(decoder: Mapping[str, Any]) -> int | None:
    """Return how many tokens a decoder has positions for, by its config; None where it does not say."""
    most = decoder.get("max_position_embeddings", decoder.get("n_positions"))
    if most is not None and decoder.get("model_type") in _AFTER_PADDING:
        most -= decoder.get("pad_token_id", 1) + 1
    return most


def special_tokens(settings: Mapping[str, Any]) -> Special:
    """Return the tokens that begin, end and fill up captions, as a generation config names them."""
    ends = settings.get("eos_token_id")
    ends = tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (ends,)
    start: Any
    start, pad = settings.get("decoder_start_token_id"), settings.get("pad_token_id")
    start = settings.get("bos_token_id") if start is None else start
    return Special(start, ends, (ends[0] if ends else 0) if pad is None else pad)


def refuse_unknown(tokens: Sequence[int], spelt: Callable[[int], Any], model: str) -> None:
    """Raise ModelError for a token that the tokenizer does not know: it would be left out of the caption."""
    for token in tokens:
        if spelt(token) is None:
            hint = "it is another model's: copy or fetch the model again"
            raise ModelError(f"the tokenizer of {model} does not know the token {token}, which the model made", hint)
