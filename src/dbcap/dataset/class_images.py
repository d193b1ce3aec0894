"""Images of the class, beside which a subject is learnt: made by the base model once, or the user's own photos.

What the model makes lies in the data folder under a key of all that decides it, so that every data set of that model
and class uses the same ones, and more of them are made by making the missing ones only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbcap.config.base import CommonConfig
from dbcap.config.models import GenerateConfig
from dbcap.config.paths import data_dir
from dbcap.dataset import photos
from dbcap.dataset.manifest import DataSet
from dbcap.dataset.words import Words
from dbcap.errors import OUT_OF_TIME, DbcapError, InputError
from dbcap.events import Events
from dbcap.files import sha256_of
from dbcap.generation import plan, run
from dbcap.generation.manifest import Manifest
from dbcap.generation.output import Printer
from dbcap.generation.plan import Given, Planned
from dbcap.generation.prompts import Request
from dbcap.inputs import shown
from dbcap.models import device as devices
from dbcap.models import families
from dbcap.models.hub import LocalModel
from dbcap.models.waiting import waiting_lock

FOLDER = "class-images"
OWN_CAPTION = "a photo of a {class}"
"""Of the user's own photos."""
_KEY_LENGTH = 16


class TimeOverError(Exception):
    """Not all class images are made yet."""


@dataclass(frozen=True)
class ClassImage:
    """An image of the class; `sha256` is that of the file."""

    path: Path
    sha256: str
    caption: str


def ensure(
    data: DataSet,
    local: LocalModel,
    device: str,
    common: CommonConfig,  # noqa: ARG001 - what runs a model takes it
    events: Events,
    seconds: float | None = None,
) -> tuple[ClassImage, ...]:
    """Return the class images of a data set in their order, making what is missing. Empty where there are none.

    Image i shows prompt i mod P from seed i, by the model's own scheduler, in the number format that is best for it on
    `device`. Its pixels depend on nothing else. Where another process makes the same images, it is waited for.
    Own photos are brought to size as the subject's are; those that cannot be read are reported and left out.

    Raises DbcapError where images cannot be made, TimeOverError where that takes longer than `seconds`, Interrupted
    where a signal stops it: then those made are kept.
    """
    if data.classes is None or not data.classes.count:
        return ()
    if data.classes.folder:
        return _own(data, data.classes.folder, events)
    choice = devices.choose(device=device, dtype="auto", batch_size=1, parameters=local.parameters)
    config = _config(data, local, choice.device, choice.dtype, seconds)
    own = plan.with_own(Given(), local.additions)
    planned = plan.make(config, _requests(data), families.describe(local), local.revision, own)
    if len(_found(planned, config)) < len(planned):
        folder = Path(config.out)
        message = "another dbcap is making these class images: waiting for it"
        with waiting_lock(folder.with_name(f".{folder.name}.lock"), events, message):
            missing = len(planned) - len(_found(planned, config))  # none where the other one has made them
            if missing:
                events.say(f"making {missing} images of the class with {local.spec.text}, in {shown(config.out)}")
                report = run.make(config, planned, local, _Mute(config.format), events)
                if report.exit_code == OUT_OF_TIME:
                    raise TimeOverError
    found = _found(planned, config)
    if len(found) < len(planned):
        raise DbcapError(f"class images have gone from {shown(config.out)} meanwhile", "run the same command again")
    return tuple(found)


def _requests(data: DataSet) -> list[Request]:
    assert data.classes
    prompts = data.classes.prompts
    return [
        Request(prompts[number % len(prompts)], f"class prompt {number % len(prompts) + 1}", {"seed": number})
        for number in range(data.classes.count)
    ]


def _found(planned: Sequence[Planned], config: GenerateConfig) -> list[ClassImage]:
    """Return those of the planned images that are there."""
    manifest = Manifest(Path(config.out))
    paths = ((manifest.find(one.job.key), one.job.prompt) for one in planned)
    return [ClassImage(path, sha256_of(path), prompt) for path, prompt in paths if path]


class _Mute(Printer):
    """Prints nothing."""

    def _put(self, one: Planned, path: Path, facts: Mapping[str, Any]) -> None:  # noqa: ARG002 - the base class's
        self._lines[one.index] = b""


def _config(data: DataSet, local: LocalModel, device: str, dtype: str, seconds: float | None) -> GenerateConfig:
    """Return what `dbcap generate` would be told. The folder is named by all that decides the images but their seed."""
    assert data.classes
    said = [local.revision, data.classes.prompts, data.classes.guidance, data.classes.steps, data.size, dtype]
    key = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:_KEY_LENGTH]
    settings: dict[str, Any] = {"dtype": dtype, "steps": data.classes.steps, "guidance": data.classes.guidance}
    return GenerateConfig(
        prompts=data.classes.prompts,
        model=data.model,
        base=data.base,
        device=device,
        width=data.size,
        height=data.size,
        out=str(data_dir() / FOLDER / key),
        on_error="stop",
        max_time=None if seconds is None else f"{max(1, int(seconds))}s",
        **settings,
    )


def _own(data: DataSet, source: str, events: Events) -> tuple[ClassImage, ...]:
    """Return the user's own photos of the class, brought to size in the data folder."""
    key = hashlib.sha256(json.dumps([data.size, data.crop]).encode()).hexdigest()[:_KEY_LENGTH]
    folder = data_dir() / FOLDER / f"own-{key}"
    caption = Words("", data.class_word).fill(OWN_CAPTION)
    found = []
    for one in photos.find([source], events):
        try:
            path = photos.brought_to_size(one, data.crop, data.size, folder)
        except InputError as error:
            events.fail(photos.about(one, error))
            continue
        found.append(ClassImage(path, sha256_of(path), caption))
    if not found:
        raise DbcapError(f"none of the photos in {shown(source)} can be read", "see above what is wrong with each")
    return tuple(found)
