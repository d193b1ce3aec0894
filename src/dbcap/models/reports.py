"""What is known about models without loading them: what `dbcap models show` and `list` tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from dbcap.errors import ModelError
from dbcap.events import Events
from dbcap.models import hub, pipelines, remote, single_file, trained
from dbcap.models.hashing import content_hash, fingerprint
from dbcap.models.layout import CONFIG, PIPELINE, Kind, file_names, kind_of, read_config
from dbcap.models.remote import HubOutOfReachError, ModelFile, RemoteModel
from dbcap.models.specs import ModelSpec


@dataclass(frozen=True)
class ModelReport:
    """What `dbcap models show` tells. `files` are those that are read; of what is not known, the text is empty."""

    spec: ModelSpec
    kind: Kind
    model_type: str
    revision: str
    files: tuple[ModelFile, ...]
    licence: str
    description: str
    pickled: bool
    cached: bool
    """The files are here: nothing has to be fetched."""
    folder: Path | None
    """Where they are."""
    problem: str
    """Why it cannot be loaded; empty if it can."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class CachedModel:
    """One revision of a model in the hub's cache."""

    repo: str
    revision: str
    refs: tuple[str, ...]
    """Branches and tags that stand for it."""
    size: int
    """Bytes on disk; files shared with another revision count for both."""
    kind: Kind
    complete: bool
    """All that is read is there, so that `--offline` works."""
    folder: Path


def inspect(text: str, *, kind: str | None = None, offline: bool, events: Events, home: Path) -> ModelReport:
    """Return what is known about a model without fetching its weights. Raises `UsageError` or `ModelError`.

    `kind` is what it shall be loaded as; with None it is whichever it is, of several of a plugin the captioner.
    """
    spec = hub.parsed(text)
    if spec.kind == "file" and spec.path is not None:
        return _inspect_file(spec, spec.path.absolute(), home)
    if spec.kind == "run":
        return _inspect_run(spec, offline, events, home)
    if spec.kind == "folder" and spec.path is not None:
        return _inspect_folder(spec, spec.path.absolute(), kind, home / "hashes.json")
    if spec.kind == "named":
        model = hub.of_plugin(spec, kind)
        report = _inspect_folder(spec, hub.own_folder(spec, model.kind), model.kind, home / "hashes.json")
        return replace(report, licence=model.licence or report.licence, description=model.description)
    return _inspect_hub(spec, kind, offline or remote.forbidden(), events)


def _inspect_folder(spec: ModelSpec, folder: Path, kind: str | None, memory: Path) -> ModelReport:
    choice, problem = None, ""
    try:
        choice = hub.layout_of(folder, spec.text, kind, variant=spec.variant)
        names, revision = choice.names, fingerprint(folder, choice.names, memory)
    except ModelError as error:
        problem, revision = error.message, ""
        names = tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))
    return ModelReport(
        spec=spec,
        kind=kind_of(read_config(folder), file_names(folder)),
        model_type=_model_type(folder),
        revision=revision,
        files=hub.hashed(folder, names, memory),
        licence=_licence(folder),
        description="",
        pickled=choice is not None and bool(choice.pickled),
        cached=True,
        folder=folder,
        problem=problem,
    )


def _inspect_file(spec: ModelSpec, file: Path, home: Path) -> ModelReport:
    found, problem = single_file.read(file), ""
    try:
        single_file.folder_of(found, None, home)
    except ModelError as error:
        problem = f"without --base, {error.message}"
    digest = content_hash(file, home / "hashes.json")
    return ModelReport(
        spec=spec,
        kind="diffusion",
        model_type=f"{single_file.NAMES[found.kind]}, one file",
        revision=digest,
        files=(ModelFile(file.name, file.stat().st_size, digest),),
        licence="",
        description="",
        pickled=False,
        cached=True,
        folder=file.parent,
        problem=problem,
    )


def _inspect_run(spec: ModelSpec, offline: bool, events: Events, home: Path) -> ModelReport:
    """Look into a pipeline, or into the model before and what was trained of it or beside it."""
    found = trained.find(spec)
    text = str(found.folder) if found.whole else found.model
    report = inspect(text, kind="diffusion", offline=offline, events=events, home=home)
    description = f"{found.method}, step {found.step} of the run {found.run}, on {found.model}"
    if found.whole:
        return replace(report, spec=spec, description=description)
    small = pipelines.small([file.name for file in report.files])
    kept = [file for file in report.files if file.name in small or file.name.partition("/")[0] not in found.weights]
    made = {path.relative_to(found.folder).as_posix() for path in found.weights.values()}
    return replace(
        report,
        spec=spec,
        revision="" if found.method == "full" else report.revision,
        files=(*kept, *hub.hashed(found.folder, sorted(made), home / "hashes.json")),
        description=description,
        problem="" if found.base else report.problem,
    )


def _inspect_hub(spec: ModelSpec, kind: str | None, offline: bool, events: Events) -> ModelReport:
    cached = hub.in_cache(spec, kind)
    message = f"{spec.text} is not in the cache, and --offline (or HF_HUB_OFFLINE) forbids to ask the hub"
    if not offline:
        try:
            found = remote.ask(spec.repo, spec.revision, timeout=hub.ASK_SECONDS, events=events)
        except HubOutOfReachError as error:
            message = f"{error.message}, and {spec.text} is not in the cache"
            events.detail(f"{error.message}: showing what is in the cache")
        else:
            return _inspect_remote(spec, kind, found, events)
    if not cached:
        raise hub.absent(spec, message)
    folder, commit = cached
    choice = hub.layout_of(folder, spec.text, kind)
    return ModelReport(
        spec=spec,
        kind=kind_of(read_config(folder), file_names(folder)),
        model_type=_model_type(folder),
        revision=commit,
        files=tuple(remote.cached_file(folder, name) for name in choice.names),
        licence=_licence(folder),
        description="",
        pickled=bool(choice.pickled),
        cached=True,
        folder=folder,
        problem="",
    )


def _inspect_remote(spec: ModelSpec, kind: str | None, found: RemoteModel, events: Events) -> ModelReport:
    folder = remote.snapshot_folder(spec.repo, found.commit)
    choice, problem = None, ""
    try:
        choice = hub.CHOOSERS[kind or hub.kind_of_names(found.files)](found.files, spec.text)
    except ModelError as error:
        problem = error.message
    names = choice.names if choice else tuple(sorted(found.files))
    files = remote.sized(spec.repo, found.commit, [found.files[name] for name in names], events)
    config: Mapping[str, Any] | None = found.config
    model_type = str((config or {}).get("model_type") or "")
    told = PIPELINE if PIPELINE in found.files else CONFIG
    if told in found.files and not model_type:  # a pipeline, or a mirror that tells less than the hub
        here = remote.small_file(spec.repo, found.commit, told, events).parent
        config, model_type = read_config(here), _model_type(here)
    cached = choice is not None and all((folder / name).is_file() for name in names)
    return ModelReport(
        spec=spec,
        kind=kind_of(config, found.files),
        model_type=model_type,
        revision=found.commit,
        files=files,
        licence=found.licence,
        description="",
        pickled=choice is not None and bool(choice.pickled),
        cached=cached,
        folder=folder if cached else None,
        problem=problem,
    )


def _model_type(folder: Path) -> str:
    """Return what transformers or diffusers call it, or an empty string."""
    if hub.kind_in(folder) == "diffusion":
        return pipelines.class_name(folder)
    return str((read_config(folder) or {}).get("model_type") or "")


def _licence(folder: Path) -> str:
    """Return the licence that the front matter of a model card states, or an empty string."""
    card = folder / "README.md"
    if not card.is_file():
        return ""
    try:
        licence = (metadata_load(card) or {}).get("license") or ""
    except (ValueError, yaml.YAMLError):
        return ""
    return ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence)


def cached_models() -> list[CachedModel]:
    """Return the models in the hub's cache, by name and commit; whichever program fetched them."""
    try:
        cache = scan_cache_dir(remote.cache_folder())
    except CacheNotFound:
        return []
    found = [
        CachedModel(
            repo=repo.repo_id,
            revision=revision.commit_hash,
            refs=tuple(sorted(revision.refs)),
            size=revision.size_on_disk,
            kind=_cached_kind(revision.snapshot_path),
            complete=hub.whole(revision.snapshot_path),
            folder=revision.snapshot_path,
        )
        for repo in cache.repos
        if repo.repo_type == "model"
        for revision in repo.revisions
    ]
    return sorted(found, key=lambda model: (model.repo, model.revision))


def _cached_kind(folder: Path) -> Kind:
    try:
        return kind_of(read_config(folder), file_names(folder))
    except ModelError:  # a damaged config.json
        return "unknown"
