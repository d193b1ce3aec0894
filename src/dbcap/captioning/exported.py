"""Captioners that `dbcap export --onnx` wrote: an ONNX engine, a tokenizer and preprocessing. Nothing imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tokenizers import Tokenizer

from dbcap.captioning.decoding import Decoding
from dbcap.captioning.engines.onnx import OnnxEngine
from dbcap.captioning.preprocessing import Preprocessing
from dbcap.captioning.search import Found, search
from dbcap.captioning.settings import GENERATION, decoding_defaults, positions_of, refuse_unknown, special_tokens
from dbcap.errors import ModelError
from dbcap.models.layout import CONFIG, read_object
from dbcap.plugins.api import Candidate, Capabilities

_CLEANED = {
    **{f" {mark}": mark for mark in ".?!,"},
    " ' ": "'",
    **{f" {ending}": ending for ending in ("n't", "'m", "'s", "'ve", "'re")},
}
"""What transformers' tokenizers that clean up replace, in their order."""


class ExportedCaptioner:
    """Two ONNX files and what goes with them."""

    def __init__(self, folder: Path, name: str, encoder: Path, decoder: Path, threads: int) -> None:
        """Load them. Raises ModelError for what is missing or damaged."""
        self.name = name
        self._defaults = decoding_defaults(folder, name)
        self._special = special_tokens(self._defaults)
        self._config = read_object(folder / CONFIG)
        self._preprocessing = Preprocessing.of(read_object(folder / "preprocessor_config.json"), name)
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises that very class
            hint = "copy it again, or export the model again"
            raise ModelError(f"{name} has no readable tokenizer.json: {error}", hint) from error
        told = read_object(folder / "tokenizer_config.json")
        # As transformers: not for BPE, whose spaces before a full stop are the text's own.
        self._cleans = bool(told.get("clean_up_tokenization_spaces")) and type(self._tokenizer.model).__name__ != "BPE"
        self.engine = OnnxEngine(encoder, decoder, threads)
        self._check_tokens()

    def _check_tokens(self) -> None:
        """Raise ModelError for special tokens that the decoder cannot read, or that are none."""
        special, size = self._special, self.engine.vocabulary
        for use, token in (("begin", special.start), ("fill up", special.pad), *(("end", one) for one in special.ends)):
            # One that the decoder never makes ends no caption, and that is all.
            if type(token) is not int or (use != "end" and token not in range(size)):
                what = f"names the token {token!r} to {use} captions, and its decoder has {size} tokens"
                raise ModelError(f"the {GENERATION} of {self.name} {what}", "correct it, or export the model again")

    @property
    def capabilities(self) -> Capabilities:
        """What this model can do."""
        most = positions_of(self._config.get("decoder", {}))
        return Capabilities(beams=True, sampling=True, prompts=False, candidates=True, max_positions=most)

    def defaults(self) -> Mapping[str, Any]:
        """Return what the model's generation_config.json names, by dbcap's names."""
        return self._defaults

    def prepare(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Resize, crop and normalise: RGB image -> float32 (3, H, W)."""
        return self._preprocessing(image)

    def generate(
        self, pixels: npt.NDArray[np.float32], options: Mapping[str, Any], seeds: Sequence[int]
    ) -> list[list[Candidate]]:
        """Caption pixels (B, 3, H, W); returns B lists of `num_captions` candidates, best first."""
        found = self.search(pixels, Decoding(**options), seeds)
        return [[Candidate(self.text(one.tokens).strip(), one.score) for one in row] for row in found]

    def search(self, pixels: npt.NDArray[np.float32], decoding: Decoding, seeds: Sequence[int]) -> list[list[Found]]:
        """Do what `generate` does, and return tokens instead of texts."""
        return search(self.engine, pixels, decoding, self._special, seeds)

    def text(self, tokens: Sequence[int]) -> str:
        """Return what tokens spell, without the special ones and not stripped. Raises ModelError for an unknown one."""
        refuse_unknown(tokens, self._tokenizer.id_to_token, self.name)
        text = str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
        if self._cleans:
            for spaced, clean in _CLEANED.items():
                text = text.replace(spaced, clean)
        return text
