"""Textual inversion (arXiv:2208.01618): a file with the vectors of a new word, one or more, for each text encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dbcap.errors import ModelError, UsageError

_OF_XL = ("clip_l", "clip_g")
"""How files for SDXL name the vectors of its first and its second encoder."""


@dataclass(frozen=True)
class Embedding:
    """One file."""

    path: Path
    word: str
    vectors: tuple[torch.Tensor, ...]
    """One (N, C) for each text encoder of the model."""

    @property
    def tokens(self) -> list[str]:
        """The N tokens that the word becomes."""
        return [self.word, *(f"{self.word}_{number}" for number in range(1, len(self.vectors[0])))]

    def teach(self, tokenizer: Any) -> None:
        """Add the tokens. Raises UsageError for a word that the model knows already."""
        if not tokenizer.get_vocab().keys().isdisjoint(self.tokens):
            raise UsageError(
                f"{self.path}: the word {self.word!r} is known to this model already", "rename the file, or the word"
            )
        tokenizer.add_tokens(self.tokens)

    def give(self, place: int, tokenizer: Any, encoder: Any) -> None:
        """Add the vectors to a text encoder. Raises UsageError for those of another width."""
        vectors = self.vectors[place]
        table = encoder.get_input_embeddings()
        width = table.weight.shape[1]
        if vectors.shape[1] != width:
            raise UsageError(
                f"{self.path}: its vectors have {vectors.shape[1]} numbers, and this model's {width}",
                "it is for another model",
            )
        ids = tokenizer.convert_tokens_to_ids(self.tokens)
        rows = table.weight.new_zeros(max(max(ids) + 1, len(table.weight)), width)
        rows[: len(table.weight)] = table.weight
        rows[ids] = vectors.to(rows)
        table.weight, table.num_embeddings = nn.Parameter(rows, requires_grad=False), len(rows)


def written_out(text: str, tokenizer: Any) -> str:
    """Put all tokens of each word that a tokenizer was taught in the place of the word, as diffusers does."""
    taught = tokenizer.get_added_vocab()
    for word in taught:
        tokens = [word]
        while (more := f"{word}_{len(tokens)}") in taught:
            tokens.append(more)
        if len(tokens) > 1:
            text = text.replace(word, " ".join(tokens))
    return text


def added_words(tokenizer: Any) -> list[str]:
    """Return the words that a tokenizer of transformers has beyond its vocabulary."""
    tokens = tokenizer.added_tokens_decoder.items()
    return [token.content for number, token in tokens if number >= tokenizer.vocab_size]


def read(path: Path, encoders: int) -> Embedding:
    """Read a file for a model with that many text encoders. Raises UsageError for one that is none, or for another.

    Raises ModelError for one that is damaged.
    """
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "it must be a whole .safetensors file") from error
    word = path.stem
    if set(_OF_XL) <= found.keys():
        vectors = [found[name] for name in _OF_XL]
    elif len(found) == 1:
        name, value = next(iter(found.items()))
        vectors = [value]
        word = word if name == "emb_params" else name
    else:
        raise UsageError(f"{path} holds no embedding: {', '.join(sorted(found)[:3])}", "choose another file")
    if not word.strip():
        raise UsageError(f"{path}: its word is empty", "rename the file, or the word")
    if len(vectors) != encoders:
        counts = f"{path} is for a model with {len(vectors)} text encoders, and this one has {encoders}"
        raise UsageError(counts, "choose another file")
    vectors = [value[None] if value.ndim == 1 else value for value in vectors]
    if any(value.ndim != 2 or not len(value) for value in vectors) or len({len(value) for value in vectors}) != 1:
        raise UsageError(f"{path} holds no embedding: its tensors are not of vectors", "choose another file")
    return Embedding(path, word, tuple(vectors))
