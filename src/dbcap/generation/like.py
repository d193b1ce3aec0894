"""`--like FILE`: the job that is written in a picture, and how it was run. A picture may come from a stranger."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le
from pydantic import TypeAdapter, ValidationError

from dbcap.config.fields import flag_of
from dbcap.config.layers import checked
from dbcap.config.models import GenerateConfig
from dbcap.errors import UsageError
from dbcap.generation import pictures, schedulers
from dbcap.generation.jobs import Job
from dbcap.inputs import shown
from dbcap.models import trained
from dbcap.models.specs import OF_RUN

_OF_JOB = (
    *("negative", "seed", "width", "height", "steps", "guidance", "guidance_rescale", "eta"),
    *("long_prompt", "strength"),
)
"""Fields of a job that are options too, with the same bounds."""
_ALWAYS = ("model", "device", "dtype", "batch_size")
_PERHAPS = ("engine", "base", "init", "mask", "lora", "embedding", "low_memory")
"""Facts that are options too: those of every picture, and those of some."""
_HASH = re.compile("[0-9a-f]{64}")
_REVISION = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_LONGEST_REASON = 300


@dataclass(frozen=True)
class Recipe:
    """What a picture says about how it was made."""

    job: Job
    row: Annotated[int, Ge(0)]
    """Its place in its batch."""
    threads: Annotated[int, Ge(1), Le(1024)]
    batch_size: Annotated[int, Ge(1), Le(4096)]


def read(path: str, config: GenerateConfig) -> tuple[Recipe, GenerateConfig]:
    """Return what to make, and the settings it was made with. Opens nothing but the picture.

    A file that `config` names goes before the one that is written there, and its model where that one is gone. Raises
    UsageError for a picture that says nothing or nonsense, and for a file that is gone.
    """
    name = shown(path)
    if not Path(path).is_file():
        raise UsageError(f"--like: there is no file {name}", "check the path")
    facts = pictures.facts_of(Path(path))
    if facts is None:
        raise UsageError(f"--like: {name} does not say how it was made", "it must be an image that dbcap generated")
    try:
        recipe = _recipe(facts)
        said = _settings(facts, recipe.job)
    except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError, UsageError) as error:
        raise damaged(path, _reason(error)) from error
    return recipe, config.model_copy(update={**said, **_places(recipe.job, said, config), "num_images": 1})


def damaged(path: str, why: str) -> UsageError:
    """Return the error for a picture whose facts cannot be true."""
    why = shown(why)
    why = why if len(why) <= _LONGEST_REASON else why[:_LONGEST_REASON] + " ..."
    return UsageError(f"--like: what {shown(path)} says of itself is damaged: {why}")


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


# ---- what is said


def _recipe(facts: dict[str, Any]) -> Recipe:
    said = {field.name: facts[field.name] for field in fields(Recipe)}
    recipe = TypeAdapter(Recipe).validate_json(json.dumps(said), strict=True)
    _check(recipe.job)
    if recipe.job.key != facts["key"]:
        raise ValueError("its key is not that of its job")
    if recipe.row >= recipe.batch_size:
        raise ValueError("its row is not in its batch")
    return recipe


def _check(job: Job) -> None:
    """Raise ValueError or UsageError for a job that no command line could have asked for."""
    for key in _OF_JOB:
        checked(f"generate.{key}", getattr(job, key), flag_of(key))
    schedulers.known(None if job.scheduler == schedulers.OWN else job.scheduler)
    if not job.prompt.strip():
        raise ValueError("its prompt is empty")
    hashes = [*filter(None, (job.init, job.mask)), *(digest for digest, _ in job.additions)]
    if not _REVISION.fullmatch(job.model) or not all(map(_HASH.fullmatch, hashes)):
        raise ValueError("one of its hashes is none")
    if not all(math.isfinite(scale) for _, scale in job.additions):
        raise ValueError("the scale of a LoRA is no finite number")
    if job.mask and not job.init:
        raise ValueError("it has a mask, and nothing that it is the mask of")
    if job.init and not schedulers.kept_steps(job.steps, job.strength):
        raise ValueError(f"a strength of {job.strength:g} leaves none of {job.steps} steps")


def _settings(facts: dict[str, Any], job: Job) -> dict[str, Any]:
    """Return the facts that are options. Raises KeyError, ConfigError or ValueError."""
    known = {key: GenerateConfig.model_fields[key].default for key in _PERHAPS} | facts
    said = {key: checked(f"generate.{key}", known[key], flag_of(key)) for key in (*_ALWAYS, *_PERHAPS)}
    count = len(said["lora"]) + len(said["embedding"])
    own = said["model"].startswith(OF_RUN)  # what such a model brings along stands in the job alone
    if count > len(job.additions) or (count < len(job.additions) and not own):
        raise ValueError("it has not as many LoRA and embedding files as its job")
    for key in ("init", "mask"):
        if getattr(job, key) and not said[key]:
            raise ValueError(f"{flag_of(key)} is missing")
    return said


# ---- where its files are


def _places(job: Job, said: dict[str, Any], config: GenerateConfig) -> dict[str, Any]:
    """Return where the files of a picture are by now. What it was made without stays away, be it in a profile."""
    model = said["model"]
    lost = trained.is_gone(model)
    if lost or (Path(model).is_absolute() and not os.path.exists(model)):
        if config.model == GenerateConfig.model_fields["model"].default:
            raise _gone(model, "--model MODEL")
        model = config.model
    places: dict[str, Any] = {"model": model}
    for key, form, used in (
        ("base", "--base FOLDER", model.endswith(".safetensors")),
        ("init", "--init FILE", job.init),
        ("mask", "--mask FILE", job.mask),
    ):
        given, then = getattr(config, key), said[key]
        if used and then and not given and not _there(then):
            raise _gone(then, form)
        places[key] = (given or then) if used else None
    return places | {key: _additions(key, said[key], getattr(config, key), lost) for key in ("lora", "embedding")}


def _additions(key: str, then: tuple[str, ...], given: tuple[str, ...], lost: bool) -> tuple[str, ...]:
    if given and (then or lost):  # a run that is lost may have had one of its own
        return given
    for text in then:
        path, colon, scale = text.rpartition(":") if key == "lora" else (text, "", "")
        if not _there(path):
            others = ", and the others with it" if len(then) > 1 else ""
            raise _gone(path or text, f"{flag_of(key)} FILE{colon}{scale}", others)
    return then


def _there(path: str) -> bool:
    """Return whether a file or folder is there: a pipe or a device would hang or never end."""
    return os.path.isfile(path) or os.path.isdir(path)


def _gone(path: str, form: str, others: str = "") -> UsageError:
    return UsageError(f"--like: there is no {shown(path)} any more", f"give {shown(form)}, where it is now{others}")
