"""How captions are searched for: the user's options over the model's own, refused by name where they cannot work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dbcap.config.fields import flag_of
from dbcap.config.models import OF_BEAMS
from dbcap.errors import UsageError

if TYPE_CHECKING:
    from dbcap.config.models import CaptionConfig
    from dbcap.plugins.api import Capabilities

MAX_LENGTH = 16  # tokens, where neither user nor model names a length: that of the published model's card
_SAMPLING = ("top_p", "top_k", "temperature")
_OF_MODEL = (
    "num_beams",
    "max_length",
    "min_length",
    "length_penalty",
    "early_stopping",
    "no_repeat_ngram_size",
    "repetition_penalty",
    *_SAMPLING,
)


@dataclass(frozen=True)
class Decoding:
    """Settled decoding options, named as in `dbcap caption`; `None` is the library's neutral value."""

    num_beams: int = 1
    max_length: int = MAX_LENGTH
    min_length: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str = False
    no_repeat_ngram_size: int | None = None
    repetition_penalty: float | None = None
    sample: bool = False
    top_p: float | None = None
    top_k: int | None = None
    temperature: float | None = None
    num_captions: int = 1
    prompt: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return all options by name."""
        return asdict(self)


def settle(config: CaptionConfig, defaults: Mapping[str, Any], can: Capabilities, model: str) -> Decoding:
    """Put the user's options over the model's `defaults`. Raises UsageError for what cannot work."""
    values = _own(defaults, can)
    if config.sample:
        values |= {"num_beams": 1, **dict.fromkeys(OF_BEAMS)}
    else:
        values |= dict.fromkeys(_SAMPLING)
    values |= {name: getattr(config, name) for name in _OF_MODEL if getattr(config, name) is not None}
    values["num_beams"] = values["num_beams"] or 1
    values["max_length"] = values["max_length"] or MAX_LENGTH
    if config.min_length is None and values["min_length"]:
        values["min_length"] = min(values["min_length"], values["max_length"])
    stopping = values["early_stopping"]
    values["early_stopping"] = {"yes": True, "no": False, None: False}.get(stopping, stopping)
    decoding = Decoding(**values, sample=config.sample, num_captions=config.num_captions, prompt=config.prompt)
    _refuse_what_model_cannot(config, decoding, can, model)
    _refuse_combinations(config, decoding, can, model)
    return decoding


def _own(defaults: Mapping[str, Any], can: Capabilities) -> dict[str, Any]:
    """Return the model's own settings, its lengths within what it has room for: as `generate` takes them."""
    values: dict[str, Any] = {name: defaults.get(name) for name in _OF_MODEL}
    if values["max_length"] and can.max_positions:
        values["max_length"] = min(values["max_length"], can.max_positions)
    return values


def _refuse_what_model_cannot(config: CaptionConfig, decoding: Decoding, can: Capabilities, model: str) -> None:
    asked = {
        "prompt": (config.prompt is not None, can.prompts, "takes no prompt"),
        "num_beams": (decoding.num_beams > 1, can.beams, "has no beam search"),
        "sample": (config.sample, can.sampling, "does not sample"),
        "num_captions": (config.num_captions > 1, can.candidates, "gives one caption an image"),
    }
    for name, (wanted, able, words) in asked.items():
        if wanted and not able:
            raise UsageError(f"{model} {words}", f"leave out {flag_of(name)}")


def _refuse_combinations(config: CaptionConfig, decoding: Decoding, can: Capabilities, model: str) -> None:
    if decoding.num_captions > decoding.num_beams and not decoding.sample:
        raise UsageError(
            f"--num-captions {decoding.num_captions} needs as many beams, and the search has {decoding.num_beams}",
            f"add --num-beams {decoding.num_captions}, or --sample",
        )
    for name in OF_BEAMS:
        if getattr(config, name) is not None and decoding.num_beams == 1:
            raise UsageError(f"{flag_of(name)} needs beams", "add --num-beams 4, for example")
    if can.max_positions and decoding.max_length > can.max_positions:
        raise UsageError(
            f"--max-length {decoding.max_length} is beyond the {can.max_positions} positions of {model}",
            f"use {can.max_positions} or less",
        )
    if decoding.max_length < 2:
        raise UsageError("--max-length 1 leaves no token beside the start token", "use 2 or more")
    if config.min_length is not None and config.min_length > decoding.max_length:
        raise UsageError(
            f"--min-length {decoding.min_length} is above --max-length {decoding.max_length}", "change one of them"
        )
