"""What the settings of several commands have in common: kinds of values, groups of options, common options."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import AfterValidator

from dbcap.config.fields import Section, option

COMMON = "Common options"
OUTPUT = "Output"
READING = "Reading"
COMPUTE = "Model and device"
OF_MODEL = "the model's own"

Count = Annotated[int, Ge(1)]
MOST = 256  # beams, candidates, threads: more is a slip of the finger, and takes all memory


def _text(value: str) -> str:
    if not value or "\0" in value:
        raise ValueError("empty, or no text")
    return value


# No MinLen: it would refuse file names that are no UTF-8.
Text = Annotated[str, AfterValidator(_text)]
Place = Annotated[str, AfterValidator(lambda value: os.path.expanduser(_text(value)))]
"""A file or folder; ~ is the home also where no shell has seen to it."""
Side = Annotated[int, Ge(1), Le(8192)]
Seed = Annotated[int, Ge(0), Le(2**64 - 1)]
_DURATION = r"^(\d{1,6}h(\d{1,6}m)?(\d{1,6}s)?|\d{1,6}m(\d{1,6}s)?|\d{1,9}s?)$"


def time_limit(help_: str, unset: str, *, group: str, changeable: bool = False) -> Any:
    """Return the field of a `--max-time`; TIME in the help becomes examples of one."""
    return option(
        None,
        help_.replace("TIME", "this time, as in 45s, 30m or 1h30m"),
        group=group,
        metavar="TIME",
        pattern=_DURATION,
        takes="a time such as 45s, 30m or 1h30m",
        unset=unset,
        changeable=changeable,
    )


class CommonConfig(Section):
    """What every command understands. These keys stand at the top of a file, outside of any table."""

    quiet: bool = option(False, "Say only what failed.", "-q", group=COMMON)
    verbose: bool = option(False, "Explain what was chosen and why.", "-v", group=COMMON)
    progress: bool = option(True, "Show progress where stderr is a terminal.", group=COMMON)
    log_file: str | None = option(
        None, "Append everything that is said to this file, with times.", group=COMMON, metavar="FILE"
    )
    offline: bool = option(False, "Never ask the hub: use what is cached.", group=COMMON)
    allow_pickle: bool = option(
        True, "Read models that exist as a pickled file only (by a loader that runs no code).", group=COMMON
    )


class DeviceConfig(Section):
    """Where a model runs."""

    device: str = option(
        "auto",
        "Where the model runs: auto, cpu, cuda, cuda:N or mps.",
        group=COMPUTE,
        metavar="DEVICE",
        pattern=r"^(auto|cpu|cuda(:[0-9]+)?|mps)$",
        takes="auto, cpu, cuda, cuda:N or mps",
    )


class ComputeConfig(DeviceConfig):
    """Where and how a model runs."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Number format of the weights.", group=COMPUTE
    )
    batch_size: Literal["auto"] | Count = option("auto", "Images that go through the model at once.", group=COMPUTE)
    compile: bool = option(False, "Use torch.compile, where it is of use: for long runs on a GPU.", group=COMPUTE)
