"""What `run:NAME` is: the model that a run made or one of its checkpoints, and what has to be put together for that."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbcap import runs
from dbcap.errors import DbcapError, ModelError, UsageError
from dbcap.models import pipelines, remote
from dbcap.models.families.description import Description
from dbcap.models.hashing import content_hash
from dbcap.models.identity import Identity
from dbcap.models.layout import CONFIG, PIPELINE, read_object
from dbcap.models.pipelines import IDENTITY
from dbcap.models.specs import FINAL, OF_RUN, ModelSpec, parse
from dbcap.runs import Run

if TYPE_CHECKING:
    from dbcap.models.hub import LocalModel

_FULL, _EMBEDDING = "full", "embedding"
_ADAPTER = "adapter"
_WEIGHTS = ("ema", "weights")
"""Folders of a checkpoint, the one that users want first."""


@dataclass(frozen=True)
class Addition:
    """A LoRA file and its scale, or an embedding file."""

    path: Path
    scale: float
    sha256: str
    embedding: bool = False
    own: bool = False
    """Whether it belongs to the model itself: `run:NAME` brings it along."""

    def __str__(self) -> str:
        """Return what the option takes."""
        path = os.path.abspath(self.path)
        return path if self.embedding else f"{path}:{self.scale!r}"


@dataclass(frozen=True)
class Trained:
    """What a run made, in the end or at a checkpoint."""

    run: str
    step: int
    address: str
    """What `--model` takes to find it again: the step that `last` or `best` stood for."""
    method: str
    model: str
    """What it was trained on, as `--model` takes it; a model of the hub by its commit."""
    base: str | None
    """The folder with configs that goes with it, where that is one file."""
    revision: str
    """Of the model that it was trained on."""
    identity: Identity
    folder: Path
    whole: bool
    """Whether that is a pipeline, as the result of the method `full` is."""
    weights: Mapping[str, Path]
    """Else part of the pipeline -> its weights, or `adapter` -> the LoRA or embedding."""

    def addition(self, memory: Path) -> Addition | None:
        """Return the LoRA or embedding, hashed; None where parts were trained."""
        path = self.weights.get(_ADAPTER)
        if path is None:
            return None
        return Addition(path, 1.0, content_hash(path, memory), self.method == _EMBEDDING, own=True)


def find(spec: ModelSpec) -> Trained:
    """Return what `run:NAME[@STEP]` stands for. Nothing large is read.

    Raises UsageError where there is no such run or checkpoint, DbcapError for a run that is not finished or damaged.
    """
    run = runs.find(spec.name)
    said = run.read()
    final = spec.revision == FINAL
    folder = run.result() if final else run.checkpoint(spec.revision)
    step = said["step"] if final else int(folder.name)
    try:
        method, before = said["method"], said["base"]
        model, base, revision = str(before["model"]), before.get("base"), str(before["revision"])
        words = Identity(said["identifier"], said["class"])
    except (LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{run.folder / runs.MANIFEST} is damaged: what it was trained on is missing") from error
    whole = final and method == _FULL
    return Trained(
        run=run.name,
        step=step,
        address=f"{OF_RUN}{run.name}" if final else f"{OF_RUN}{run.name}@{step}",
        method=method,
        model=pinned(model, revision),
        base=base,
        revision=revision,
        identity=words,
        folder=folder,
        whole=whole,
        weights={} if whole else _weights(run, folder, final, method),
    )


def is_gone(text: str) -> bool:
    """Return whether an address is that of a run or a checkpoint which is not there any more."""
    if not text.startswith(OF_RUN):
        return False
    try:
        find(parse(text))
    except DbcapError:
        return True
    return False


def check(found: Trained, memory: Path) -> None:
    """Raise ModelError where weights of a checkpoint are not what was written; `memory` is of `content_hash`."""
    state = found.folder / runs.STATE
    if not state.is_file():
        return
    for path in found.weights.values():
        name = f"{path.parent.name}/{path.name}"
        if read_object(state).get("files", {}).get(name) != content_hash(path, memory):
            raise ModelError(
                f"{path} is not what was written", f"`dbcap runs show {found.run}` lists other checkpoints"
            )


def pinned(model: str, revision: str) -> str:
    """Return the address of a model of the hub with its commit; others have a hash of 64 digits in its place."""
    return f"{model.partition('@')[0]}@{revision}" if remote.COMMIT.fullmatch(revision) else model


def _weights(run: Run, folder: Path, final: bool, method: str) -> dict[str, Path]:
    places = [folder] if final else [folder / name for name in _WEIGHTS]
    found = next((files for place in places if (files := sorted(place.glob("*.safetensors")))), [])
    if method != _FULL and len(found) == 1:
        return {_ADAPTER: found[0]}
    if method != _FULL or not found:
        raise ModelError(f"{folder} lacks its weights", f"`dbcap runs show {run.name}` lists what there is")
    return {path.stem: path for path in found}


# ---- a checkpoint as a pipeline


def assembled(found: Trained, base: LocalModel, cache: Path, safety: bool) -> Path:
    """Return a folder in diffusers' layout for a checkpoint: links to its weights, all else from the model before.

    It is made once for these files at these places; weights that change there change here. Raises ModelError where it
    cannot be written, UsageError where the model before is no pipeline alone.
    """
    if base.additions:
        hint = f"{OF_RUN}{found.run} is whole, once the run is finished"
        raise UsageError(f"{found.address} was trained on {found.model}, which has a LoRA or embedding", hint)
    documents = {IDENTITY: {"identifier": found.identity.identifier, "class": found.identity.class_word}}
    documents |= _documents(base)
    links = {name: path for name, path in _links(found, base, safety).items() if name not in documents}
    unpacked = [part for part in base.single.parts if part not in found.weights] if base.single else []
    key = json.dumps([base.revision, documents, unpacked, {name: str(path) for name, path in links.items()}])
    target = cache / "checkpoints" / hashlib.sha256(key.encode()).hexdigest()
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, suffix=".tmp") as name:
            made = Path(name) / "model"
            for place in {(made / file).parent for file in (*links, *documents)}:
                place.mkdir(parents=True, exist_ok=True)
            for file, path in links.items():
                (made / file).symlink_to(path)
            for file, document in documents.items():
                (made / file).write_text(json.dumps(document), "utf-8")
            for part in unpacked:
                _unpack(base, part, documents[f"{part}/{CONFIG}"], made)
            _publish(made, target)
    except OSError as error:
        raise ModelError(f"cannot write {target.parent}: {error.strerror or error}", "make room there") from error
    return target


def _publish(made: Path, target: Path) -> None:
    try:
        made.rename(target)
    except OSError:  # another process was faster
        if not target.is_dir():
            raise


def _documents(base: LocalModel) -> dict[str, dict[str, Any]]:
    """Return what a pipeline's folder says otherwise than the folder with configs that goes with one file."""
    if base.single is None:
        return {}
    model = Description(base)
    configs = {f"{part}/{CONFIG}": model.config(part) for part in base.single.parts}
    return configs | {PIPELINE: read_object(base.folder / PIPELINE) | {pipelines.CHECKER: [None, None]}}


def _links(found: Trained, base: LocalModel, safety: bool) -> dict[str, Path]:
    """Return which file stands for which one of a pipeline."""
    if base.single:
        names = pipelines.small_in(base.folder)
    else:
        choice = pipelines.choose_in(base.folder, found.model, safety=safety)
        kept = [name for part, files in choice.weights.items() if part not in found.weights for name in files]
        names = (*choice.small, *kept)
    links = {name: (base.folder / name).resolve() for name in names}
    return links | {pipelines.weights_of(part): path.resolve() for part, path in found.weights.items()}


def _unpack(base: LocalModel, part: str, config: Mapping[str, Any], folder: Path) -> None:
    """Write the weights of a part of a model in one file to where a folder has them."""
    from dbcap.models.families.original import OriginalWeights  # this and the next import torch
    from dbcap.models.tensors import save_file

    assert base.single is not None
    weights = OriginalWeights(base.single, part, config)
    save_file(weights.tensors(weights.dtype), folder / pipelines.weights_of(part), {"format": "pt"})
