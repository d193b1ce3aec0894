"""Captioning from Python: `Captioner.load("starter").caption("photo.jpg").text`."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

import numpy as np
from pydantic import ValidationError

from dbcap.captioning import decoding, loader
from dbcap.captioning.decoding import Decoding
from dbcap.captioning.feed import IMAGES, ImageLike, Item, batches, is_image, item_of, picture_of, prepare, stacked
from dbcap.captioning.loader import ENGINES, Ready
from dbcap.captioning.reading import Prepared, evenly
from dbcap.captioning.run import image_seed
from dbcap.config.fields import flag_of
from dbcap.config.layers import checked
from dbcap.config.models import CaptionConfig
from dbcap.config.paths import cache_dir
from dbcap.errors import InputError, UsageError, did_you_mean
from dbcap.events import Silent
from dbcap.inputs import Source
from dbcap.models import hub
from dbcap.models.memory import memory_errors
from dbcap.plugins.api import Candidate

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL: str = CaptionConfig.model_fields["model"].default


@dataclass(frozen=True, slots=True)
class Caption:
    """The caption of one image."""

    text: str
    """The best candidate's."""
    score: float
    """The best candidate's: higher is better, comparable among the candidates of one image only."""
    candidates: tuple[Candidate, ...]
    """`num_captions` of them, each with `text` and `score`, best first."""


class CaptionOptions(TypedDict, total=False):
    """The keywords of `Captioner.caption`: named, bounded and explained as the options of `dbcap caption`.

    `None`, or leaving one out, means the model's own value where it has one.
    """

    prompt: str | None
    num_beams: int | None
    max_length: int | None
    min_length: int | None
    length_penalty: float | None
    early_stopping: bool | Literal["yes", "no", "never"] | None
    no_repeat_ngram_size: int | None
    repetition_penalty: float | None
    sample: bool
    top_p: float | None
    top_k: int | None
    temperature: float | None
    num_captions: int
    seed: int
    batch_size: int | Literal["auto"]
    alpha: str
    max_pixels: int
    url_timeout: float
    url_max_mb: int
    workers: int


class Captioner:
    """A loaded captioning model. Made by `Captioner.load`; may be used by one thread at a time."""

    def __init__(self, ready: Ready) -> None:
        self._captioner, self._choice, self._check = ready.captioner, ready.choice, ready.check

    @classmethod
    def load(
        cls,
        spec: str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        engine: str = "auto",
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        offline: bool = False,
        allow_pickle: bool = True,
    ) -> Captioner:
        """Load a model, fetching it first if need be.

        `spec` is what `dbcap caption --model` takes: `starter`, `org/name[@revision]` on the hub, or a folder.
        `device` is auto, cpu, cuda, cuda:N or mps; `dtype` auto, float32, bfloat16 or float16, or torch's own.
        `offline` never asks the hub; `allow_pickle=False` refuses models that exist as a pickled file only.

        Raises UsageError for an engine, device, dtype or spec that cannot be, ModelError for what cannot be loaded.
        """
        return cls(load(spec, engine=engine, device=device, dtype=dtype, offline=offline, allow_pickle=allow_pickle))

    @property
    def name(self) -> str:
        """The spec that was loaded."""
        return self._captioner.name

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        import torch

        return torch.device(self._choice.device)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights; of an exported model what goes in and comes out."""
        import torch

        dtype: torch.dtype = getattr(torch, self._choice.dtype)
        return dtype

    @property
    def model(self) -> Any:
        """The transformers model, to look into; None for a plugin's captioner that has none.

        dbcap's own decoding holds the weights in another form, so this may be loaded at first use, and changing it
        need not change captions.
        """
        return getattr(self._captioner, "model", None)

    def __repr__(self) -> str:
        return f"<Captioner {self.name} on {self._choice.device} in {self._choice.dtype}>"

    @overload
    def caption(  # type: ignore[overload-overlap]  # a str is a sequence too, and an image
        self, images: ImageLike, **options: Unpack[CaptionOptions]
    ) -> Caption: ...
    @overload
    def caption(  # type: ignore[overload-overlap]
        self, images: Sequence[ImageLike], **options: Unpack[CaptionOptions]
    ) -> list[Caption]: ...
    @overload
    def caption(self, images: Iterable[ImageLike], **options: Unpack[CaptionOptions]) -> Iterator[Caption]: ...
    def caption(self, images: Any, **options: Unpack[CaptionOptions]) -> Caption | list[Caption] | Iterator[Caption]:
        """Caption one image (-> a Caption), a sequence (-> a list), or any other iterable (-> a lazy iterator).

        An image is a path, an http(s) URL, the bytes of an image file, a PIL image, or RGB pixels as uint8 (H, W, 3);
        an array (N, H, W, 3) is a sequence. Images are turned as their EXIF says, and what is transparent lies on the
        colour `alpha`. The lazy iterator has read no more than one batch (`batch_size`) beyond what it gave.

        Options are those of `dbcap caption`, see `CaptionOptions`. Raises TypeError for an unknown one, UsageError for
        values that cannot work, both before any image is read, and InputError, which names it, in the place of an
        image that cannot be read: the captions before it still come out of a lazy iterator.
        """
        config = config_of(options)
        settled = self._settle(config)
        batch = self._choice.batch_size if config.batch_size == "auto" else config.batch_size
        if hasattr(images, "read") or _is_tensor(images):
            raise UsageError(f"{type(images).__name__} is no image and holds none", IMAGES)
        if is_image(images):
            return next(self._captions([item_of(images)], config, settled, 1))
        if isinstance(images, Sequence | np.ndarray):
            items = [item_of(image, place) for place, image in enumerate(images)]
            if config.batch_size == "auto":
                batch = evenly(len(items), batch)
            return list(self._captions(items, config, settled, min(batch, len(items))))
        try:
            source = iter(images)
        except TypeError:
            raise UsageError(f"{type(images).__name__} is no image and holds none", IMAGES) from None
        stream = (item_of(image, place) for place, image in enumerate(source))
        return self._captions(stream, config, settled, batch)

    def _settle(self, config: CaptionConfig) -> Decoding:
        try:
            settled = decoding.settle(config, self._captioner.defaults(), self._captioner.capabilities, self.name)
            self._check(settled.as_dict())
        except UsageError as error:
            raise UsageError(as_python(error.message), as_python(error.hint)) from None
        return settled

    def _captions(
        self, items: Sequence[Item] | Iterator[Item], config: CaptionConfig, settled: Decoding, batch: int
    ) -> Generator[Caption]:
        """Caption in batches of `batch` rows."""

        def work(source: Source) -> Prepared:
            return prepare(source, lambda image: picture_of(image, config), self._captioner.prepare)

        with closing(batches(items, work, size=batch, workers=config.workers)) as groups:
            for group in groups:
                good = list(takewhile(lambda item: not item.error, group))
                if good:
                    rows = self._rows(len(good), batch, lazy=not isinstance(items, Sequence))
                    pixels = stacked(good, rows)
                    seeds = [image_seed(config.seed, item.sha256) for item in good]
                    seeds += seeds[-1:] * (len(pixels) - len(seeds))
                    what = f"{len(pixels)} images x {settled.num_beams} beams"
                    with memory_errors(what, "use a smaller batch_size or fewer beams"):
                        found = self._captioner.generate(pixels, settled.as_dict(), seeds)
                    for _, candidates in zip(good, found, strict=False):  # rows beyond are repetitions
                        yield Caption(candidates[0].text, candidates[0].score, tuple(candidates))
                if len(good) < len(group):
                    raise named(group[len(good)])

    def _rows(self, good: int, batch: int, *, lazy: bool) -> int:
        """Return the rows that a batch of `good` images gets.

        Low-precision kernels round differently at other shapes, so there all batches have one shape; of a sequence the
        float32 ones too, as in `dbcap caption`.
        """
        return good if lazy and self._choice.dtype == "float32" else batch


# ---- loading


class _Log(Silent):
    """Events for Python's logging, under the name `dbcap`."""

    _logger = logging.getLogger("dbcap")

    def say(self, message: str) -> None:
        self._logger.info(message)

    def warn(self, message: str) -> None:
        self._logger.warning(message)

    def detail(self, message: str) -> None:
        self._logger.debug(message)


def load(
    spec: str | os.PathLike[str],
    *,
    engine: str,
    device: str | torch.device,
    dtype: str | torch.dtype,
    offline: bool,
    allow_pickle: bool,
) -> Ready:
    """Do what `Captioner.load` does."""
    if engine not in ENGINES:
        near = did_you_mean(str(engine), ENGINES)
        raise UsageError(f"there is no engine {engine!r}", near or f"the engines are {', '.join(ENGINES)}")
    events = _Log()
    kind = loader.kind_for(engine)
    asked: dict[str, Any] = {"offline": offline, "allow_pickle": allow_pickle}
    local = hub.locate(os.fsdecode(spec), kind=kind, events=events, home=cache_dir(), **asked)
    try:
        number = str(dtype).removeprefix("torch.")
        return loader.load(local, events, engine=engine, device=str(device), dtype=number)
    except UsageError as error:
        raise UsageError(as_python(error.message), as_python(error.hint)) from None


def _is_tensor(value: Any) -> bool:
    """Return whether a value is torch's, without importing torch."""
    return "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor)


# ---- options


def config_of(options: Mapping[str, Any]) -> CaptionConfig:
    """Return the command's own configuration, which holds all bounds, from keywords.

    Raises TypeError for an unknown keyword, UsageError for a value that is not allowed or excludes another.
    """
    known = CaptionOptions.__annotations__
    for name in options:
        if name not in known:
            near = did_you_mean(name, known)
            raise TypeError(f"caption() got an unexpected keyword argument {name!r}{near and '; ' + near}")
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(stopping := given.get("early_stopping"), bool):
        given["early_stopping"] = "yes" if stopping else "no"
    try:
        values = {name: checked(f"caption.{name}", value, flag_of(name)) for name, value in given.items()}
        return CaptionConfig(inputs=(), **values)
    except ValidationError as error:
        raise UsageError(as_python(error.errors()[0]["msg"].removeprefix("Value error, "))) from None
    except UsageError as error:
        raise UsageError(as_python(error.message), as_python(error.hint)) from None


def as_python(text: str) -> str:
    """Write the options in a message as Python's keywords: `--num-beams 4` -> `num_beams=4`."""

    def keyword(match: re.Match[str]) -> str:
        name = match[1].replace("-", "_")
        return f"{name}={match[2]}" if match[2] else "sample=True" if name == "sample" else name

    return re.sub(r"--([a-z]+(?:-[a-z]+)*)(?: (\d+)\b)?", keyword, text)


def named(item: Prepared) -> InputError:
    """Return the error of an image, with its name."""
    assert item.error
    return InputError(
        f"{item.source.name}: {as_python(item.error.message)}", as_python(item.error.hint), kind=item.error.kind
    )
