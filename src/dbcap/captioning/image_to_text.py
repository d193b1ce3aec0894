"""What transformers v4's `pipeline("image-to-text")` did, before v5 removed it: its inputs, results and errors.

What it got wrong is right here: with `num_return_sequences=n` every image has n captions at every batch size.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Sized
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset
from transformers import GenerationConfig

from dbcap.captioning.captioner import TransformersCaptioner
from dbcap.captioning.decoding import Decoding
from dbcap.captioning.feed import Item, batches, item_of, prepare, stacked
from dbcap.captioning.image_sources import named, picture_of
from dbcap.captioning.reading import Prepared
from dbcap.config.layers import checked
from dbcap.config.models import CaptionConfig
from dbcap.errors import ConfigError, UsageError
from dbcap.inputs import Source

NEW_TOKENS = 256
"""Most tokens of a caption where the model's own settings name no length."""
ON_ERROR = ("raise", "skip", "record")

Rows = list[dict[str, Any]]
"""The captions of one image: `[{"generated_text": "a dog"}]`."""

_FIELDS = {
    "do_sample": "sample",
    "num_return_sequences": "num_captions",
    **{
        name: name
        for name in ("num_beams", "max_length", "min_length", "length_penalty", "early_stopping", "top_k", "top_p")
    },
    **{name: name for name in ("temperature", "no_repeat_ngram_size", "repetition_penalty")},
}
"""What dbcap's own search knows, by transformers' names -> by the names of `Decoding`."""
_SEARCHED = {*_FIELDS, "max_new_tokens", "min_new_tokens"}
_LENGTHS = (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))
_log = logging.getLogger("dbcap")


@dataclass(frozen=True)
class _Settings:
    """What governs a call besides decoding: given to `pipeline`, and again to a call."""

    prompt: str | None = None
    timeout: float | None = None
    batch_size: int = 1
    num_workers: int = 0
    strip: bool = False
    on_error: str = "raise"

    def __post_init__(self) -> None:
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise ValueError(
                f"Received an invalid text input, got - {type(self.prompt)} - but expected a single string. "
                "Note also that one single text can be provided for conditional image to text generation."
            )
        for name, least in (("batch_size", 1), ("num_workers", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
                raise UsageError(f"{name}={value!r} is not allowed", f"it is a whole number from {least}")
        if self.timeout is not None and not (isinstance(self.timeout, int | float) and self.timeout > 0):
            raise UsageError(f"timeout={self.timeout!r} is not allowed", "it is in seconds, above 0")
        if self.on_error not in ON_ERROR:
            raise UsageError(f"on_error={self.on_error!r} is not known", f"use {', '.join(ON_ERROR)}")

    def changed(self, **given: Any) -> _Settings:
        """Return these with those that are not None in place of their own."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})


def _forwarded(max_new_tokens: int | None, generate_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    forward = dict(generate_kwargs or {})
    if max_new_tokens is not None:
        if "max_new_tokens" in forward:
            raise ValueError(
                "`max_new_tokens` is defined both as an argument and inside `generate_kwargs` argument, please use"
                " only 1 version"
            )
        forward["max_new_tokens"] = max_new_tokens
    return forward


@dataclass(frozen=True)
class _Plan:
    """How the captions of one call are made: by dbcap's search, or where `decoding` is None by `model.generate`."""

    settings: _Settings
    decoding: Decoding | None
    config: GenerationConfig
    extra: Mapping[str, Any]


class ImageToTextPipeline:
    """Captions images as v4's class of this name did. Made by `dbcap.pipeline`; for one thread at a time."""

    task = "image-to-text"

    def __init__(
        self,
        captioner: TransformersCaptioner,
        *,
        own_search: bool = True,
        max_new_tokens: int | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        timeout: float | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        strip: bool | None = None,
        on_error: str | None = None,
        **generation: Any,
    ) -> None:
        """Take a loaded captioner, and what every call shall start from.

        Without `own_search` transformers' `generate` makes all captions, with the model as it is at that moment.
        `generation` are settings of the generation config by name, as in `pipeline(..., num_beams=4)`.
        """
        self._captioner, self._own_search = captioner, own_search
        self._settings = _Settings().changed(
            prompt=prompt,
            timeout=timeout,
            batch_size=batch_size,
            num_workers=num_workers,
            strip=strip,
            on_error=on_error,
        )
        self._forward = _forwarded(max_new_tokens, generate_kwargs)
        self.generation_config: GenerationConfig = GenerationConfig()
        """What calls start from: the model's own settings, and 256 new tokens where these name no length."""
        own = {name: value for name, value in captioner.defaults().items() if not name.startswith("_")}
        self.generation_config.update(**own)
        if self.generation_config.max_length is None and self.generation_config.max_new_tokens is None:
            self.generation_config.max_new_tokens = NEW_TOKENS
        self._own = self.generation_config.to_dict()
        if unknown := _update(self.generation_config, generation):
            raise TypeError(f"pipeline() got an unexpected keyword argument {next(iter(unknown))!r}")

    @property
    def model(self) -> Any:
        """The transformers model. Captions need not follow what is changed in it: see `Captioner.model`."""
        return self._captioner.model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._captioner.tokenizer

    @property
    def image_processor(self) -> Any:
        """The model's image processor."""
        return getattr(self._captioner.image_processor, "own", self._captioner.image_processor)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._captioner.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        dtype: torch.dtype = self._captioner.dtype
        return dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        """The same, by v4's name."""
        return self.dtype

    def __call__(
        self,
        inputs: Any = None,
        *,
        images: Any = None,
        max_new_tokens: int | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        timeout: float | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        strip: bool | None = None,
        on_error: str | None = None,
    ) -> Any:
        """Caption one image, a list, or a stream of them.

        An image is a path, an http(s) URL, a picture in base64 or as a `data:image` URI, or a PIL image. One image
        gives `[{"generated_text": text}]`, a list one such list an image, a generator (or another iterator) and a torch
        `Dataset` a lazy iterator of them, which reads no more than a batch ahead. Texts are not stripped: a trailing
        space is the model's own.

        `prompt` begins the caption (BLIP, GIT); `timeout` (seconds, else 30) is for fetching a URL; `num_workers` reads
        images in so many threads. `generate_kwargs` are those of transformers' `generate`.
        `strip=True` strips texts. `on_error="skip"` leaves out images that fail, with a warning in the log `dbcap`;
        `"record"` puts `[{"generated_text": None, "error": message}]` in their place.

        Raises ValueError, TypeError and UnidentifiedImageError as v4 did; those of an image are InputErrors too.
        """
        inputs = inputs if images is None else images
        if inputs is None:
            raise ValueError("Cannot call the image-to-text pipeline without an inputs argument!")
        settings = self._settings.changed(
            prompt=prompt,
            timeout=timeout,
            batch_size=batch_size,
            num_workers=num_workers,
            strip=strip,
            on_error=on_error,
        )
        plan = self._plan(settings, _forwarded(max_new_tokens, generate_kwargs))
        if isinstance(inputs, list):
            items = [item_of(image, place) for place, image in enumerate(inputs)]
            return list(self._results(items, plan))
        if isinstance(inputs, Dataset) and isinstance(inputs, Sized):
            return _OfDataset(inputs, lambda source: self._results(_numbered(source), plan))
        if isinstance(inputs, Iterator | Dataset):
            return self._results(_numbered(iter(inputs)), plan)
        return next(self._results([item_of(inputs)], plan), [])

    # ---- how captions are made

    def _plan(self, settings: _Settings, forward: dict[str, Any]) -> _Plan:
        """Settle a call. Raises ValueError for a prompt that the model cannot take, UsageError for one too long."""
        kind = self._captioner.config.model_type
        if settings.prompt is not None and not self._captioner.capabilities.prompts:
            raise ValueError(f"Model type {kind} does not support conditional text generation")
        forward = {**self._forward, **forward}
        given = forward.pop("generation_config", None)
        config = copy.deepcopy(self.generation_config if given is None else given)
        extra = _update(config, forward)
        self._fit(config, settings.prompt)
        changed = {name for name, value in config.to_dict().items() if value != self._own.get(name)}
        searched = self._own_search and given is None and not extra and changed <= _SEARCHED
        return _Plan(settings, _decoding(config, settings.prompt) if searched else None, config, extra)

    def _fit(self, config: GenerationConfig, prompt: str | None) -> None:
        """Write lengths out for this prompt, and keep them within the decoder's positions."""
        tokenizer = self._captioner.tokenizer
        start = 1 + (len(tokenizer(prompt, add_special_tokens=False).input_ids) if prompt else 0)
        longest = config.max_length if config.max_new_tokens is None else start + config.max_new_tokens
        if longest is not None:
            longest = min(longest, self._captioner.capabilities.max_positions or longest)
            if longest <= start and prompt:
                words = f"the prompt and the start token are {start} tokens, and a caption may have {longest}"
                raise UsageError(words, "shorten the prompt, or raise the length")
            config.max_length, config.max_new_tokens = longest, max(longest - start, 0) or None
        if config.min_new_tokens is not None:
            config.min_length = start + config.min_new_tokens

    def _results(self, items: Sequence[Item] | Iterator[Item], plan: _Plan) -> Generator[Rows]:
        settings = plan.settings
        size = min(settings.batch_size, len(items)) if isinstance(items, Sequence) else settings.batch_size

        def work(source: Source) -> Prepared:
            return prepare(source, lambda image: picture_of(image, settings.timeout), self._captioner.prepare)

        with closing(batches(items, work, size=size, workers=settings.num_workers)) as groups:
            for group in groups:
                fails = settings.on_error == "raise"
                taken = list(takewhile(lambda item: not item.error, group)) if fails else group
                good = [item for item in taken if not item.error]
                lazy = self.dtype == torch.float32 and not isinstance(items, Sequence)
                made = iter(self._captions(good, len(good) if lazy else size, plan) if good else ())
                for item in taken:
                    if not item.error:
                        yield next(made)
                    elif settings.on_error == "record":
                        yield [{"generated_text": None, "error": str(named(item))}]
                    else:
                        _log.warning("skipped: %s", named(item))
                if len(taken) < len(group):
                    raise named(group[len(taken)])

    def _captions(self, good: Sequence[Prepared], rows: int, plan: _Plan) -> list[Rows]:
        """Caption a batch of `rows` rows; returns the captions of each image."""
        pixels = stacked(good, rows)
        if plan.decoding is None:
            found = self._generate(pixels, plan)
        else:
            # Drawn from the global generator, so that torch.manual_seed decides, and each image has its own.
            seeds = [int(torch.randint(2**63 - 1, ())) if plan.decoding.sample else 0 for _ in good]
            seeds += seeds[-1:] * (len(pixels) - len(seeds))
            found = [[one.tokens for one in row] for row in self._captioner.search(pixels, plan.decoding, seeds)]
        texts = [[self._captioner.text(tokens) for tokens in row] for row in found[: len(good)]]
        return [[{"generated_text": text.strip() if plan.settings.strip else text} for text in row] for row in texts]

    def _generate(self, pixels: npt.NDArray[np.float32], plan: _Plan) -> list[list[Sequence[int]]]:
        """Let transformers generate for pixels (B, 3, H, W): what dbcap's search does not know. B lists of tokens."""
        tensor = torch.from_numpy(pixels).to(self.device, self.dtype)
        inputs = self._captioner.inputs(tensor, plan.settings.prompt)
        config = copy.copy(plan.config)
        if self.model.generation_config.max_new_tokens is None and config.max_length is not None:
            config.max_new_tokens = None  # nothing overrules the length, and two of them are warned about
        output = self.model.generate(**inputs, generation_config=config, **plan.extra)
        rows = getattr(output, "sequences", output).tolist()
        count = len(rows) // len(pixels)
        return [rows[start : start + count] for start in range(0, len(rows), count)]


class _OfDataset(Iterator[Rows]):
    """The results of a dataset that knows its length: they have a length too, and start anew with each `iter`."""

    def __init__(self, dataset: Any, results: Callable[[Iterator[Any]], Iterator[Rows]]) -> None:
        self._dataset, self._results = dataset, results
        self._running = self._start()

    def _start(self) -> Iterator[Rows]:
        return self._results(self._dataset[place] for place in range(len(self._dataset)))

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Rows]:
        self._running = self._start()
        return self

    def __next__(self) -> Rows:
        return next(self._running)


def _numbered(source: Iterator[Any]) -> Iterator[Item]:
    return (item_of(image, place) for place, image in enumerate(source))


def _update(config: GenerationConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """Put settings into a config; returns those that are none. A length that is given outdoes the default one."""
    for name in ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences"):
        if not hasattr(values.get(name, 0) or 0, "__index__"):
            raise UsageError(f"{name}={values[name]!r} is not allowed", "it is a whole number")
    for length, made in _LENGTHS:
        if values.get(length) is not None and made not in values:
            setattr(config, made, None)
    for name in ("num_beams", "num_return_sequences"):
        if values.get(name) is not None and values[name] < 1:
            raise ValueError(f"`{name}` must be 1 or more, but is {values[name]}.")
    unused: dict[str, Any] = config.update(**values)
    return unused


def _decoding(config: GenerationConfig, prompt: str | None) -> Decoding | None:
    """Return the options of dbcap's search, or None for what it refuses: transformers then judges it."""
    values: dict[str, Any] = {ours: getattr(config, name, None) for name, ours in _FIELDS.items()}
    sample, beams = bool(values["sample"]), values["num_beams"] or 1
    if not sample:
        values |= dict.fromkeys(("top_k", "top_p", "temperature"))
    if beams == 1:
        values |= dict.fromkeys(("length_penalty", "early_stopping"))
    values = {name: value for name, value in values.items() if value is not None}
    if (sample and beams != 1) or values.get("num_captions", 1) > (256 if sample else beams):
        return None
    if config.max_new_tokens is None or values.get("min_length", 0) > values["max_length"]:
        return None
    bounded = values.keys() & CaptionConfig.model_fields.keys() - {"early_stopping"}  # that has other words there
    try:
        for name in bounded:
            checked(f"caption.{name}", values[name], name)
    except ConfigError:
        return None
    return Decoding(**values, prompt=prompt)
