"""`--like FILE`: the job that is written in a picture, and how it was run."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from pydantic import TypeAdapter, ValidationError

from dbcap.config.layers import checked
from dbcap.config.models import GenerateConfig
from dbcap.errors import ConfigError, UsageError
from dbcap.generation import pictures
from dbcap.generation.jobs import Job
from dbcap.inputs import shown


@dataclass(frozen=True)
class Recipe:
    """What a picture says about how it was made."""

    job: Job
    row: Annotated[int, Ge(0)]
    """Its place in its batch."""
    threads: Annotated[int, Ge(1)]
    batch_size: Annotated[int, Ge(1)]


def read(path: str, config: GenerateConfig) -> tuple[Recipe, GenerateConfig]:
    """Return what to make, and the settings it was made with. Raises UsageError for a picture that says nothing."""
    name = shown(path)
    if not Path(path).is_file():
        raise UsageError(f"--like: there is no file {name}", "check the path")
    facts = pictures.facts_of(Path(path))
    if facts is None:
        raise UsageError(f"--like: {name} does not say how it was made", "it must be an image that dbcap generated")
    try:
        recipe = _recipe(facts)
        changes = {
            key: checked(f"generate.{key}", facts[key], name) for key in ("model", "device", "dtype", "batch_size")
        }
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise UsageError(f"--like: what {name} says of itself is damaged: {why}") from error
    files = {**{name: facts.get(name) for name in ("base", "init", "mask")}, "lora": tuple(facts.get("lora", ()))}
    files["embedding"] = tuple(facts.get("embedding", ()))
    return recipe, config.model_copy(update={**changes, **files, "num_images": 1})


def _recipe(facts: dict[str, Any]) -> Recipe:
    said = {field.name: facts[field.name] for field in fields(Recipe)}
    recipe = TypeAdapter(Recipe).validate_json(json.dumps(said), strict=True)
    if recipe.job.key != facts["key"]:
        raise ValueError("its key is not that of its job")
    if recipe.row >= recipe.batch_size:
        raise ValueError("its row is not in its batch")
    return recipe
