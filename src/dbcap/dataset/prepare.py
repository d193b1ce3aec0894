"""Photos made into a data set: read > looked over > brought to size > captions > written."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from dbcap.config.base import CommonConfig
from dbcap.config.paths import cache_dir
from dbcap.config.training import PreparingConfig
from dbcap.dataset import captions, identifier, photos, store, words
from dbcap.dataset.captions import one_line
from dbcap.dataset.manifest import FOLDER, ClassSettings, DataSet, Photo, Source
from dbcap.dataset.photos import Shot
from dbcap.dataset.remembering import Remembering
from dbcap.dataset.store import Earlier
from dbcap.dataset.words import Words
from dbcap.errors import OK, PARTIAL, UsageError
from dbcap.events import Events
from dbcap.files import Lock
from dbcap.generation.prompts import IDENTIFIER
from dbcap.inputs import Source as Found
from dbcap.inputs import shown
from dbcap.models import families, hub
from dbcap.models.hub import LocalModel


@dataclass(frozen=True)
class Prepared:
    """A photo before and after."""

    name: str
    """Of its file, or its path where two have the same name."""
    size: tuple[int, int]
    """Width and height that it had."""
    photo: Photo
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class PrepReport:
    """What came of preparing photos."""

    dataset: DataSet
    local: LocalModel
    """The model, as it was found."""
    photos: tuple[Prepared, ...]
    written: int
    """Photos that are new or were changed."""
    removed: int
    """Photos of the data set that went."""
    failed: int
    duplicates: int
    """Left out as near-duplicates."""
    class_images: int = 0

    @property
    def exit_code(self) -> int:
        """0, or 3 when photos could not be read."""
        return PARTIAL if self.failed else OK

    @property
    def summary(self) -> str:
        """One line for stderr."""
        counts = {
            "written": self.written,
            "removed": self.removed,
            "left out as duplicates": self.duplicates,
            "failed": self.failed,
        }
        changes = [f"{count} {what}" for what, count in counts.items() if count] or ["none of them new"]
        made = [f"{self.class_images} class images"] if self.class_images else []
        return ", ".join([f"{len(self.photos)} photo{'s' * (len(self.photos) != 1)}", *changes, *made])


def prepare(
    config: PreparingConfig, inputs: Sequence[str], out: Path, common: CommonConfig, events: Events
) -> PrepReport:
    """Prepare photos into the folder `out`, which may be a data set of ours. Makes no class images.

    Photos that cannot be read are counted in the report. Raises UsageError for what cannot work, and then touches
    nothing; LockHeldError where somebody else is at work there; DbcapError for what fails.
    """
    sources = photos.find(inputs, events)
    folders = [*filter(os.path.isdir, inputs), *(one.root for one in sources if one.root)]
    store.refuse(out, [*folders, *filter(None, [config.class_dir])], (one.name for one in sources if not one.is_url))
    heard = Remembering(events)
    class_word = words.plain("--class-word", config.class_word) if config.class_word else None
    classes = _classes(config, class_word, heard)
    local = hub.locate(
        config.model,
        kind="diffusion",
        base=config.base,
        offline=common.offline,
        allow_pickle=common.allow_pickle,
        events=events,
        home=cache_dir(),
    )
    data = DataSet(
        folder=out,
        model=str(local.spec.path.absolute()) if local.spec.path else local.spec.text,
        base=os.path.abspath(config.base) if config.base else None,
        size=_size(config, local),
        crop=config.crop,
        identifier=identifier.choose(
            config.identifier, class_word, families.load(local, "cpu", "float32").tokenizers[0], heard
        ),
        class_word=class_word,
        photos=(),
        classes=classes,
    )
    with ExitStack() as stack:
        if not out.exists():  # what fails leaves nothing behind
            stack.callback(_remove_if_empty, out)
        stack.enter_context(Lock(out / store.LOCK, remove=True))
        return _fill(data, local, sources, config, common, heard)


def _fill(
    data: DataSet,
    local: LocalModel,
    sources: Sequence[Found],
    config: PreparingConfig,
    common: CommonConfig,
    heard: Remembering,
) -> PrepReport:
    """Do so for a data set of which all but the photos is settled."""
    before = store.earlier(data.folder, heard)
    shots = photos.read(sources, config, data.size, heard)
    placed = _named(shots.good, before)
    said = _captions(placed, before, Words(data.identifier, data.class_word), config, common, heard)
    pictures, made = _pictures(data.folder, placed, said, before, heard)
    for shot in shots.good:
        for warning in shot.warnings:
            heard.warn(f"{shown(shot.name)}: {warning}")
    for file in before.edited.keys() - placed.keys():
        heard.say(f"with {file} goes its caption: {before.edited[file]}")
    data = replace(data, photos=tuple(made), warnings=tuple(heard.warnings))
    written, removed = store.commit(data, pictures, before)
    rows = zip(shots.good, made, strict=True)
    prepared = tuple(Prepared(one.name, (one.width, one.height), photo, tuple(one.warnings)) for one, photo in rows)
    return PrepReport(data, local, prepared, written, removed, shots.failed, shots.duplicates)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _size(config: PreparingConfig, local: LocalModel) -> int:
    """Return the size of prepared photos. Raises UsageError for one that the model cannot take."""
    model = families.describe(local)
    size = config.size or model.size
    if size % model.factor:
        below = max(size // model.factor, 1) * model.factor
        raise UsageError(
            f"--size {size} is no multiple of {model.factor}, as {local.spec.text} needs it", f"use {below}"
        )
    return size


def _classes(config: PreparingConfig, class_word: str | None, events: Events) -> ClassSettings | None:
    """Return what class images shall be, and say so where there will be none."""
    if config.class_dir and not class_word:
        raise UsageError("--class-dir needs --class-word", "say what kind of thing its photos show")
    if not class_word or not config.class_images:
        why = "there is no --class-word" if not class_word else "--class-images is 0"
        events.say(f"{why}: training will have no prior, and may forget other things of the subject's kind")
        return None
    prompts = words.class_prompts(config.class_prompts, class_word, events)
    folder = None
    if config.class_dir:
        folder = os.path.abspath(config.class_dir)
        if not os.path.isdir(folder):
            raise UsageError(f"--class-dir: there is no folder {shown(config.class_dir)}", "check the path")
        photos.find([folder], events)
    return ClassSettings(config.class_images, prompts, config.class_guidance, config.class_steps, folder)


# ---- names, captions, pictures


def _named(shots: Sequence[Shot], before: Earlier) -> dict[str, Shot]:
    """Return photos by the names of their files: those that they had, else new ones."""
    present = {shot.origin for shot in shots}
    placed: dict[str, Shot] = {}
    for shot in shots:
        old = before.of(shot.origin, shot.sha256, present)
        kept = old is not None and old.file not in placed
        name = old.file if old and kept else store.free_name(shot.origin, [*before.photos, *before.names, *placed])
        placed[name] = shot
    return placed


def _captions(
    placed: dict[str, Shot],
    before: Earlier,
    named: Words,
    config: PreparingConfig,
    common: CommonConfig,
    events: Events,
) -> dict[str, tuple[str, Source]]:
    """Return caption and source of each file: changed in the data set, else written beside the photo, else made."""
    written = captions.Written(events)
    found: dict[str, tuple[str, Source]] = {}
    for file, shot in placed.items():
        raw = before.edited.get(file) or written.of(shot.path)
        if text := one_line(named.fill(raw)):
            found[file] = text, "written"
            if not named.names(raw):
                shot.warnings.append(
                    f"its caption holds neither {IDENTIFIER} nor {named.identifier}, and is used as it stands"
                )
    rest = [file for file in placed if file not in found]
    if config.caption and rest:
        said = captions.described([placed[file].origin for file in rest], config, common, events)
        for file, text in zip(rest, said, strict=True):
            found[file] = named.put_into(text), "captioner"
    elif rest:
        text = one_line(named.fill(config.template))
        if not named.names(text):
            raise UsageError(f"--template {config.template!r} does not name the subject", f"put {IDENTIFIER} into it")
        for file in rest:
            found[file] = text, "template"
    return found


def _pictures(
    out: Path, placed: dict[str, Shot], said: dict[str, tuple[str, Source]], before: Earlier, events: Events
) -> tuple[dict[str, bytes], list[Photo]]:
    """Return the files to be there, and all photos; a file whose pixels somebody changed stays as it is."""
    pictures, made = {}, []
    for file, shot in placed.items():
        path, image = out / FOLDER / file, shot.image
        changed = store.edited_picture(path) if file in before.photos else None
        if changed:
            image, content = changed, path.read_bytes()
            events.say(f"{shown(str(path))} was edited, and stays as it is: without it, it is made anew")
        else:
            content = pictures[file] = store.png_of(image)
        text, source = said[file]
        made.append(
            Photo(
                file, hashlib.sha256(content).hexdigest(), text, source, shot.origin, shot.sha256, *image.size,
                edited=file in before.edited,
            )
        )  # fmt: skip
    return pictures, made
