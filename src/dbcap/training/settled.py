"""From what was asked for to what a run does: defaults by method, learning rates, what excludes what."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from dbcap.config.fields import flag_of
from dbcap.config.training import EMBEDDING_STEPS, FULL_STEPS, LEARNING_RATES, TrainConfig
from dbcap.dataset import manifest, words
from dbcap.dataset.manifest import DataSet
from dbcap.errors import UsageError
from dbcap.events import Silent
from dbcap.inputs import shown

DTYPES = {"auto": "auto", "32": "float32", "bf16": "bfloat16", "16": "float16"}
"""What `--precision` says -> number format of the forward and backward pass."""
_OF_DATA = ("size", "crop", "identifier", "class_word")
_OF_PREPARING = ("caption", "drop_duplicates")
_OF_CLASSES = {"class_images": "count", "class_guidance": "guidance", "class_steps": "steps"}


def settled(config: TrainConfig) -> TrainConfig:
    """Return the settings with everything in its place that depends on the method. Raises UsageError."""
    embedding = config.method == "embedding"
    steps = config.steps or (EMBEDDING_STEPS if embedding else FULL_STEPS)
    if config.warmup >= steps:
        raise UsageError(f"--warmup {config.warmup} is not shorter than --steps {steps}", "choose fewer steps of it")
    return config.model_copy(
        update={
            "steps": steps,
            "lr": config.lr or LEARNING_RATES[config.method],
            "prior": "none" if embedding else config.prior,
        }
    )


def given(config: TrainConfig) -> DataSet | None:
    """Return the data set that a run is to be of; None where that is photos. Raises UsageError for more than one."""
    there = [one for one in config.data if manifest.is_dataset(Path(one))]
    if there and len(config.data) > 1:
        raise UsageError(f"{shown(there[0])} is a data set, and more is named beside it", "name it alone, or photos")
    return manifest.read(Path(there[0])) if there else None


def of_data(config: TrainConfig, data: DataSet, asked: Container[str]) -> TrainConfig:
    """Return the settings as a data set has them, which is prepared.

    Raises UsageError for one that says something else and was `asked` for: it is not from a profile or the like.
    """
    classes = data.classes
    said = {name: (getattr(data, name), getattr(config, name)) for name in _OF_DATA}
    said |= {name: (False, getattr(config, name)) for name in _OF_PREPARING}
    said["class_dir"] = (classes.folder if classes else None, config.class_dir)
    if classes and not classes.folder:
        said |= {name: (getattr(classes, of), getattr(config, name)) for name, of in _OF_CLASSES.items()}
        prompts = config.class_prompts
        if "class_prompts" in asked:
            prompts = words.class_prompts(prompts, data.class_word or "", Silent())
        said["class_prompts"] = classes.prompts, prompts
    for name, (has, wish) in said.items():
        if name in asked and wish != has:
            flag = flag_of(name)
            how = f"with {flag} {_words(has)}" if has else f"without {flag}"
            value = "" if wish is True else f" {_words(wish)}"
            raise UsageError(
                f"{data.folder} was prepared {how}, and {flag}{value} is asked for",
                "run `dbcap prep` again with it",
            )
    return config.model_copy(update={name: has for name, (has, _) in said.items() if name not in _OF_PREPARING})


def _words(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def factor(config: TrainConfig) -> Callable[[int], float]:
    """Return the function from a step, counted from 0, to the part of the learning rate that it has."""
    warmup, total = config.warmup, config.steps or 1

    def part(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.lr_schedule == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        return 1 - done if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return part
