"""What a run of `dbcap generate` makes: requests, settings and the model put together into jobs."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from dbcap.config.models import GenerateConfig
from dbcap.errors import DbcapError, UsageError
from dbcap.events import Events
from dbcap.files import sha256_of
from dbcap.generation import prompts, schedulers
from dbcap.generation.jobs import MOST_SEED, Job
from dbcap.generation.like import damaged
from dbcap.generation.prompts import Request
from dbcap.images import read
from dbcap.inputs import shown
from dbcap.models.identity import Identity
from dbcap.models.trained import Addition

if TYPE_CHECKING:
    from dbcap.models.families.description import Description
    from dbcap.models.families.sd import StableDiffusion

MOST_JOBS = 1_000_000


@dataclass(frozen=True)
class Planned:
    """A job, its place in the plan, where it was asked for, and how many pieces its prompts take, if that is known."""

    index: int
    job: Job
    where: str = "the prompt"
    chunks: int = 1


@dataclass(frozen=True)
class Given:
    """The files that the user gave: pictures to begin with and to paint in, and what is added to the model."""

    init: Image.Image | None = None
    init_hash: str = ""
    mask: Image.Image | None = None
    mask_hash: str = ""
    additions: tuple[Addition, ...] = ()


def read_given(config: GenerateConfig) -> Given:
    """Read --init, --mask and --lora. Raises DbcapError, naming it, for a file that cannot be used."""
    additions = (*_loras(config), *_embeddings(config))
    if not config.init:
        return Given(additions=additions)
    init = _read(config.init)
    if not config.mask:
        return Given(init.image, init.sha256, additions=additions)
    mask = _read(config.mask)
    if mask.image.size != init.image.size:
        sizes = (f"{one.image.width}x{one.image.height}" for one in (mask, init))
        raise UsageError("--mask is {}, and --init {}".format(*sizes), "make them of one size")
    return Given(init.image, init.sha256, mask.image, mask.sha256, additions)


def with_own(given: Given, own: Sequence[Addition]) -> Given:
    """Return what was given with what belongs to the model itself: LoRA files first, then embeddings."""
    return replace(given, additions=tuple(sorted((*own, *given.additions), key=lambda one: one.embedding)))


def _read(name: str) -> Any:
    try:
        return read(name)
    except DbcapError as error:
        raise DbcapError(error.message if name in error.message else f"{name}: {error.message}", error.hint) from error


def _loras(config: GenerateConfig) -> list[Addition]:
    found = []
    for text in config.lora:
        name, colon, scale = text.rpartition(":")
        if not colon or os.path.isfile(text):
            name, scale = text, "1"
        try:
            value = float(scale)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UsageError(f"--lora {shown(text)}: {scale!r} is no scale", "write FILE:0.8, for example")
        path = Path(os.path.expanduser(name))
        if not path.is_file():
            raise UsageError(f"--lora: there is no file {shown(name)}", "check the path")
        found.append(Addition(path, value, sha256_of(path)))
    return found


def _embeddings(config: GenerateConfig) -> list[Addition]:
    found = []
    for name in config.embedding:
        path = Path(os.path.expanduser(name))
        if not path.is_file():
            raise UsageError(f"--embedding: there is no file {shown(name)}", "check the path")
        found.append(Addition(path, 1.0, sha256_of(path), embedding=True))
    return found


def first_seed(config: GenerateConfig) -> int:
    """Return the seed of the first image; a random one is drawn here, once a run."""
    if config.seed == "random":
        return int.from_bytes(os.urandom(8), "big") >> 16  # short enough to be typed again
    return config.seed


def make(
    config: GenerateConfig,
    requests: Sequence[Request],
    model: Description,
    revision: str,
    given: Given,
) -> list[Planned]:
    """Return all jobs, in order: for each prompt `num_images` seeds, counting up.

    Raises UsageError, naming the prompt, for what the model cannot do.
    """
    requests = _expanded(config, requests)
    if len(requests) * config.num_images > MOST_JOBS:
        raise UsageError(f"that makes {len(requests) * config.num_images:,} images", f"the most is {MOST_JOBS:,}")
    seed = first_seed(config)
    words = model.identity_with([one.path for one in given.additions])
    planned: list[Planned] = []
    for request in requests:
        values = _values(config, request, model, words, given)
        if "seed" not in request.overrides:
            values["seed"] = seed
        last = values["seed"] + config.num_images - 1
        if last > MOST_SEED:
            raise UsageError(f"{request.where}: the last seed would be {last}", f"the largest is {MOST_SEED}")
        values |= {"init": given.init_hash, "mask": given.mask_hash}
        added = tuple((one.sha256, one.scale) for one in given.additions)
        job = Job(model=revision, additions=added, **values)
        for number in range(config.num_images):
            one = job if not number else Job(**{**vars(job), "seed": job.seed + number})
            planned.append(Planned(len(planned), one, request.where))
    return planned


def repeated(
    job: Job,
    model: Description,
    revision: str,
    given: Given,
    config: GenerateConfig,
) -> Planned:
    """Return the job of a picture as a plan. Raises UsageError where the model or a file is another by now."""
    base = " and --base FOLDER" if config.base else ""
    for what, hint, now, then in (
        (
            f"the model {model.name}",
            f"leave nothing at its old path, and give --model MODEL{base}",
            revision,
            job.model,
        ),
        (f"the picture {config.init}", "give --init FILE", given.init_hash, job.init),
        (f"the mask {config.mask}", "give --mask FILE", given.mask_hash, job.mask),
    ):
        if now != then:
            raise UsageError(
                f"--like: {shown(what)} is not what it was: its hash was {then[:12]} and is {now[:12]}",
                f"if it was moved, {hint}, where it is now",
            )
    _check_additions(given.additions, job.additions)
    for name, size in (("width", job.width), ("height", job.height)):
        if size % model.factor:
            raise damaged(str(config.like), f"a {name} of {size} is no multiple of {model.factor}")
    return Planned(0, job)


def _check_additions(now: Sequence[Addition], then: Sequence[tuple[str, float]]) -> None:
    if len(now) != len(then):
        raise UsageError(
            f"--like: it was made with {len(then)} LoRA and embedding files, and {len(now)} are given",
            "give all of them, with --lora FILE:SCALE and --embedding FILE",
        )
    for one, (digest, scale) in zip(now, then, strict=True):
        if (one.sha256, one.scale) != (digest, scale):
            option = "--embedding FILE" if one.embedding else f"--lora FILE:{scale!r}"
            raise UsageError(
                f"--like: a LoRA or embedding file is not what it was: {shown(str(one))}",
                "its run went on since" if one.own else f"give {option}, where it is now",
            )


def _expanded(config: GenerateConfig, requests: Sequence[Request]) -> list[Request]:
    if not config.expand:
        return list(requests)
    count = sum(prompts.count_expanded(one.prompt) for one in requests)
    if count * config.num_images > MOST_JOBS:
        raise UsageError(f"--expand makes {count:,} prompts", f"the most images are {MOST_JOBS:,}")
    return [Request(text, one.where, one.overrides) for one in requests for text in prompts.expanded(one.prompt)]


def _values(
    config: GenerateConfig, request: Request, model: Description, words: Identity, given: Given
) -> dict[str, Any]:
    """Return what a request's jobs have in common, checked against the model."""
    over = request.overrides
    own = given.init.size if given.init else (model.size, model.size)
    width = over.get("width") or config.width or _cut(own[0], model.factor)
    height = over.get("height") or config.height or _cut(own[1], model.factor)
    if not width or not height:
        raise UsageError(f"--init {config.init} is {own[0]}x{own[1]} pixels only", "give --width and --height")
    for name, size in (("width", width), ("height", height)):
        if size % model.factor:
            below = max(_cut(size, model.factor), model.factor)
            raise UsageError(
                f"{request.where}: a {name} of {size} is no multiple of {model.factor}",
                f"use {below} or {below + model.factor}" if below < size else f"use {below}",
            )
    steps = over.get("steps", config.steps)
    if given.init and not schedulers.kept_steps(steps, config.strength):
        raise UsageError(
            f"{request.where}: a strength of {config.strength:g} leaves none of {steps} steps",
            f"the smallest that leaves one is {-(-10000 // steps) / 10000:g}",
        )
    filled = [
        prompts.filled(text, words.identifier, words.class_word, request.where, model.name)
        for text in (request.prompt, over.get("negative", config.negative))
    ]
    if not filled[0].strip():
        raise UsageError(f"{request.where}: the prompt is empty", "write what the image shall show")
    return {
        "prompt": filled[0],
        "negative": filled[1],
        "width": width,
        "height": height,
        "scheduler": schedulers.known(config.scheduler),
        "steps": steps,
        "guidance": over.get("guidance", config.guidance),
        "guidance_rescale": config.guidance_rescale,
        "eta": config.eta,
        "long_prompt": config.long_prompt,
        "strength": config.strength if given.init else 1.0,
        **({"seed": over["seed"]} if "seed" in over else {}),
    }


def _cut(size: int, factor: int) -> int:
    return size // factor * factor


def measured(planned: Sequence[Planned], family: StableDiffusion, events: Events) -> list[Planned]:
    """Return a plan with the number of pieces that prompts take, and say what is cut off.

    Raises UsageError, naming the prompt, for one that is too long where that is an error.
    """
    chunks: dict[tuple[str, str], int] = {}
    for one in planned:
        texts = (one.job.prompt, one.job.negative)
        if texts not in chunks:
            chunks[texts] = _chunks(one, family, events, {text for pair in chunks for text in pair})
    return [replace(one, chunks=chunks[one.job.prompt, one.job.negative]) for one in planned]


def _chunks(one: Planned, family: StableDiffusion, events: Events, known: Collection[str]) -> int:
    """Return how many pieces the longer of both prompts takes."""
    most, rule = 1, one.job.long_prompt
    for what, text in (("prompt", one.job.prompt), ("negative prompt", one.job.negative)):
        tokens = family.tokens(text)
        if len(tokens) <= family.room:
            continue
        where = f"{one.where}: the {what} has {len(tokens)} tokens, and the model reads {family.room}"
        if rule == "error":
            raise UsageError(where, "shorten it, or use --long-prompt chunk or truncate")
        if rule == "chunk":
            most = max(most, -(-len(tokens) // family.room))
        elif text not in known:
            rest = tokens[family.room :]
            lost = family.text_of(rest[:61])  # a token has a character at least
            lost = lost if len(lost) <= 60 else f"{lost[:57]}..."
            events.warn(f"{where}: left out {len(rest)} tokens, {lost!r}")
    return most


def seconds_of(duration: str) -> int:
    """Return the seconds of a time such as 1h30m, 45s or 45."""
    hours, minutes, seconds = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", duration).groups(default="0")  # type: ignore[union-attr]
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds)
