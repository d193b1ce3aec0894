"""What a run shows: the data set in the run's own folder, class images, and the latents and captions of both."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from dbcap.config.models import CommonConfig
from dbcap.config.paths import cache_dir
from dbcap.config.training import TrainConfig
from dbcap.dataset import manifest, prepare, store
from dbcap.dataset.captions import one_line
from dbcap.dataset.class_images import ClassImage
from dbcap.dataset.manifest import DataSet
from dbcap.dataset.words import Words
from dbcap.errors import DbcapError, UsageError
from dbcap.events import Events
from dbcap.files import sha256_of
from dbcap.generation.prompts import IDENTIFIER
from dbcap.models import families
from dbcap.models.hub import LocalModel
from dbcap.runs import Run
from dbcap.training import latents, settled
from dbcap.training.data import Shown
from dbcap.training.latents import Cache, Source, View

FOLDER = "dataset"
"""Where a run has its data set, whatever becomes of the one that it was made of."""


@dataclass(frozen=True)
class Material:
    """All that a run shows. `captions` are those that pictures and samples have, by number."""

    photos: tuple[Shown, ...]
    held_out: tuple[Shown, ...]
    classes: tuple[Shown, ...]
    captions: tuple[str, ...]


def data_set(run: Run, config: TrainConfig, common: CommonConfig, events: Events) -> DataSet:
    """Return the run's own data set: prepared for it, or a copy of what `dbcap prep` made. Raises UsageError."""
    own = run.folder / FOLDER
    if manifest.is_dataset(own):
        return manifest.read(own)
    if prepared := settled.given(config):
        found = _as_edited(prepared, events)
        temporary = own.with_name(f".{FOLDER}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / manifest.FOLDER).mkdir(parents=True)
        for path in map(found.path_of, found.photos):
            if not path.is_file():
                raise DbcapError(f"{path} is missing", "`dbcap prep` makes it again")
            _check(path)
            shutil.copyfile(path, temporary / manifest.FOLDER / path.name)
        replace(found, folder=temporary).write()
        temporary.rename(own)
        return manifest.read(own)
    report = prepare.prepare(config, config.data, own, common, events)
    run.update(failed_photos=report.failed)
    return report.dataset


def _check(photo: Path) -> None:
    """Raise DbcapError for a photo of a data set that cannot be read any more."""
    try:
        with Image.open(photo) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise DbcapError(f"{photo} cannot be read: {error}", "`dbcap prep` makes it again") from error


def _as_edited(data: DataSet, events: Events) -> DataSet:
    """Return a data set with the captions that were changed in it since it was prepared."""
    edited, words = store.earlier(data.folder, events).edited, Words(data.identifier, data.class_word)
    photos = []
    for photo in data.photos:
        if photo.file in edited:
            if not words.names(edited[photo.file]):
                events.warn(f"{photo.file}: its caption holds neither {IDENTIFIER} nor {data.identifier}")
            photo = replace(photo, caption=one_line(words.fill(edited[photo.file])), source="written", edited=True)
        photos.append(photo)
    return replace(data, photos=tuple(photos))


def _sources(data: DataSet) -> list[Source]:
    """Return the photos as they are now, whatever was written down of them."""
    return [Source(path, sha256_of(path)) for path in map(data.path_of, data.photos)]


def facts(data: DataSet, classes: Sequence[ClassImage]) -> dict[str, Any]:
    """Return what run.json says of the data; a run that goes on must find the same."""
    return {
        "photos": {photo.file: one.sha256 for photo, one in zip(data.photos, _sources(data), strict=True)},
        "captions": [photo.caption for photo in data.photos],
        "class_images": [one.sha256 for one in classes],
    }


def check(before: dict[str, Any], now: dict[str, Any], run: Run) -> None:
    """Raise UsageError where the data of a run has changed since it began."""
    for name, value in before.items():
        if now[name] != value:
            place = "" if name == "class_images" else f" in {run.folder / FOLDER}"
            raise UsageError(
                f"the {name.replace('_', ' ')} of the run {run.name} have changed since it began",
                f"put them back{place}, or begin a new run",
            )


def gather(
    data: DataSet,
    classes: Sequence[ClassImage],
    words: Sequence[str],
    local: LocalModel,
    config: TrainConfig,
    device: str,
    events: Events,
) -> Material:
    """Encode all pictures that are not encoded yet. `words` are captions beside theirs."""
    of_photos = _sources(data)
    of_classes = [Source(one.path, one.sha256) for one in classes]
    wanted: list[tuple[Source, View]] = []
    shares: list[tuple[int, int]] = []  # where the views of each picture are in `wanted`
    kinds: list[tuple[list[Source], Callable[[int, int], list[View]]]] = [
        (of_photos, partial(latents.views, flip=config.flip)),
        (of_photos, lambda width, height: [latents.held_out(width, height)]),
        (of_classes, partial(latents.views, flip=False)),
    ]
    for sources, views in kinds:
        for source in sources:
            with Image.open(source.path) as picture:
                chosen = views(*picture.size)
            shares.append((len(wanted), len(wanted) + len(chosen)))
            wanted.extend((source, view) for view in chosen)
    cache = Cache(
        cache_dir() / "latents", _vae_sha256(local), data.size, lambda: families.load(local, device, "float32")
    )
    found = cache.all_of(wanted, events)
    captions = [photo.caption for photo in data.photos]
    texts = tuple(dict.fromkeys([*captions, *(one.caption for one in classes), *words]))
    number = {text: at for at, text in enumerate(texts)}
    numbers = [number[text] for text in (*captions, *captions, *(one.caption for one in classes))]
    pictures = [Shown(tuple(found[start:end]), at) for (start, end), at in zip(shares, numbers, strict=True)]
    count = len(data.photos)
    return Material(tuple(pictures[:count]), tuple(pictures[count : 2 * count]), tuple(pictures[2 * count :]), texts)


def _vae_sha256(local: LocalModel) -> str:
    """Return what stands for the autoencoder's weights: the hash of its file, or of the one file there is."""
    if local.single:
        return local.revision
    return "\n".join(file.sha256 or local.revision for file in local.files if file.name.startswith("vae/"))
