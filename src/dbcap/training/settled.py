"""From what was asked for to what a run does: defaults by method, learning rates, what excludes what."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from dbcap.config.fields import flag_of
from dbcap.config.training import EMBEDDING_STEPS, FULL_STEPS, LEARNING_RATES, TrainConfig
from dbcap.errors import UsageError

if TYPE_CHECKING:
    from dbcap.dataset.manifest import DataSet

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


def check_data(config: TrainConfig, data: DataSet) -> None:
    """Raise UsageError for an option of photos that says something else than the data set, which is prepared."""
    classes = data.classes
    said = {name: (getattr(data, name), getattr(config, name)) for name in _OF_DATA}
    said |= {name: (False, getattr(config, name)) for name in _OF_PREPARING}
    said["class_dir"] = (classes.folder if classes else None, config.class_dir)
    if classes and not classes.folder:
        said |= {name: (getattr(classes, of), getattr(config, name)) for name, of in _OF_CLASSES.items()}
    for name, (has, asked) in said.items():
        if asked not in (type(config).model_fields[name].default, has):
            flag = flag_of(name)
            how = f"with {flag} {has}" if has else f"without {flag}"
            raise UsageError(
                f"{data.folder} was prepared {how}, and {flag}{'' if asked is True else f' {asked}'} is asked for",
                "run `dbcap prep` again with it",
            )


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
