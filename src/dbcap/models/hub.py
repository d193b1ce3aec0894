"""From what the user wrote after `--model` to a folder that `from_pretrained` can read, and what is known about it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from dbcap.errors import ModelError, UsageError, did_you_mean
from dbcap.events import Events
from dbcap.models import pipelines, remote, single_file
from dbcap.models.hashing import content_hash, fingerprint
from dbcap.models.layout import (
    CONFIG,
    PIPELINE,
    Files,
    Kind,
    choose,
    choose_in,
    count_in,
    file_names,
    kind_of,
    read_config,
    refuse_pickle,
)
from dbcap.models.remote import HubOutOfReachError, ModelFile, RemoteModel
from dbcap.models.single_file import SingleFile
from dbcap.models.specs import FORMS, ModelSpec, named_or_folder, parse
from dbcap.plugins import loader
from dbcap.plugins.api import Model

__all__ = ["CachedModel", "LocalModel", "ModelFile", "ModelReport", "cached_models", "inspect", "kinds", "locate"]

_CHECK_SECONDS = 5.0
"""How long the hub may take to say whether a cached model has changed."""
_ASK_SECONDS = 15.0

_CHOOSERS: dict[str, Callable[[Collection[str], str], Files]] = {
    "captioner": choose,
    "diffusion": pipelines.choose,
}
"""Kind of model -> what says by their names which of its files are read."""


@dataclass(frozen=True)
class LocalModel:
    """A model whose files are here."""

    spec: ModelSpec
    folder: Path
    """What `from_pretrained` reads: safetensors, always."""
    revision: str
    """The commit on the hub; of a folder or a plugin's model the SHA-256 over the files that are read."""
    files: tuple[ModelFile, ...]
    """The files that are read, as their publisher wrote them (before any conversion)."""
    single: SingleFile | None = None
    """The one file with all weights, where there is one; then `folder` holds its configs and tokenizers."""

    @property
    def parameters(self) -> int:
        """The number of weights of a pipeline. Raises `ModelError` for a damaged file."""
        return count_in([self.single.path]) if self.single else pipelines.count_parameters(self.folder)


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


def locate(
    text: str,
    *,
    kind: str | None = "captioner",
    base: str | None = None,
    safety: bool = False,
    offline: bool,
    allow_pickle: bool = True,
    events: Events,
    home: Path,
) -> LocalModel:
    """Return the model that `text` names, fetched and converted if need be. `home` is dbcap's cache folder.

    `base` is a folder with the configs and tokenizers of a model in one file. With `safety` the files of a pipeline's
    safety checker are among those that are read, if it has one; its revision is the same.
    `kind` is what it must be; with None it is whichever it is, of several of a plugin the captioner.
    A commit that is cached, and anything with `offline`, asks nobody. A cached branch or tag is checked against the hub
    for a few seconds; if that does not answer, the cached one is used. Raises `UsageError` or `ModelError`.
    """
    spec = _parse(text)
    if spec.kind == "file":
        return _one_file(spec, kind, base, home)
    if base is not None:
        raise UsageError("--base goes with a --model that is a .safetensors file", f"{text} has its own configs")
    if spec.kind == "hub":
        folder, commit = _from_hub(spec, kind, safety, offline or remote.forbidden(), allow_pickle, events)
        choice = _layout(folder, spec.text, kind, safety)
        revision, files = commit, tuple(remote.cached_file(folder, name) for name in choice.names)
    else:
        folder = _own_folder(spec, kind)
        choice = _layout(folder, spec.text, kind, safety)
        refuse_pickle(choice, spec.text, allow_pickle)
        memory, images = home / "hashes.json", _layout(folder, spec.text, kind)
        revision, files = fingerprint(folder, images.names, memory), _hashed(folder, choice.names, memory)
    if choice.pickled:
        from dbcap.models import weights  # it imports torch, which no other way through this file needs

        folder = weights.convert(folder, choice, cache=home, allow_pickle=allow_pickle, events=events)
    return LocalModel(spec, folder, revision, files)


# ---- plugins, folders and files


def _one_file(spec: ModelSpec, kind: str | None, base: str | None, home: Path) -> LocalModel:
    """Return a model in one file. The file with its configs and tokenizers is what its revision stands for."""
    if kind == "captioner":
        raise UsageError(f"{spec.text} is a file, and a captioner is a folder", FORMS)
    assert spec.path is not None
    found = single_file.read(spec.path.absolute())
    folder = single_file.folder_of(found, base, home)
    names, memory = pipelines.small_in(folder), home / "hashes.json"
    digest = content_hash(found.path, memory)
    revision = hashlib.sha256(f"{digest}\n{fingerprint(folder, names, memory)}".encode()).hexdigest()
    file = ModelFile(found.path.name, found.path.stat().st_size, digest)
    return LocalModel(spec, folder, revision, (*_hashed(folder, names, memory), file), found)


def _parse(text: str) -> ModelSpec:
    spec = parse(text)
    return named_or_folder(spec, [model.name for model in loader.models()]) if spec.kind == "named" else spec


def kinds(text: str) -> tuple[str, ...]:
    """Return the kinds of model that plugins have under this name, the one that counts first. Raises `UsageError`."""
    spec = _parse(text)
    return tuple(sorted(model.kind for model in loader.models() if spec.kind == "named" and model.name == spec.name))


def _named(spec: ModelSpec, kind: str | None) -> Model:
    models = loader.models()
    found = sorted((model for model in models if model.name == spec.name), key=lambda model: model.kind)
    for model in found:
        if kind in (model.kind, None):
            return model
    if found:
        what = "diffusion model" if kind == "diffusion" else kind
        raise ModelError(f"the model {spec.name} is no {what}", "see `dbcap models list`")
    near = did_you_mean(spec.name, [model.name for model in models])
    raise ModelError(
        f"no installed plugin provides a model named {spec.name}",
        f"{near or 'see `dbcap models list`'}; models of the hub are written ORG/NAME, folders ./{spec.name}",
    )


def _own_folder(spec: ModelSpec, kind: str | None) -> Path:
    """Return the folder of a plugin's model, or the one that the user named."""
    if spec.path is not None:
        return spec.path.absolute()
    folder = _named(spec, kind).folder
    if not folder.is_dir():
        raise ModelError(f"the folder of the model {spec.name} is missing: {folder}", "install its plugin again")
    return folder.absolute()


def _hashed(folder: Path, names: Collection[str], memory: Path) -> tuple[ModelFile, ...]:
    return tuple(ModelFile(name, (folder / name).stat().st_size, content_hash(folder / name, memory)) for name in names)


# ---- the hub


def _from_hub(
    spec: ModelSpec, kind: str | None, safety: bool, offline: bool, allow_pickle: bool, events: Events
) -> tuple[Path, str]:
    """Return the folder of the snapshot and its commit."""
    cached = _cached(spec, kind, safety)
    if cached and (offline or remote.COMMIT.fullmatch(spec.revision)):
        return cached
    checker = not cached and safety and _cached(spec, kind) is not None  # nothing else is missing
    missing = f"the safety checker of {spec.text}" if checker else spec.text
    if offline:
        message = f"{missing} is not in the cache, and --offline (or HF_HUB_OFFLINE) forbids to fetch it"
        raise _absent(spec, message, checker)
    try:
        found = remote.ask(spec.repo, spec.revision, timeout=_CHECK_SECONDS if cached else _ASK_SECONDS, events=events)
    except HubOutOfReachError as error:
        if cached:
            events.detail(f"{error.message}: using {spec.text} as it is in the cache ({cached[1][:12]})")
            return cached
        raise _absent(spec, f"{error.message}, and {missing} is not in the cache", checker) from error
    except ModelError as error:
        if cached:
            events.warn(f"{error.message}: using {spec.text} as it is in the cache ({cached[1][:12]})")
            return cached
        raise
    choice = _CHOOSERS[kind or _kind_of(found.files)](found.files, spec.text)
    if safety and PIPELINE in found.files:
        told = remote.small_file(spec.repo, found.commit, PIPELINE, events)
        choice = pipelines.choose(found.files, spec.text, safety=pipelines.has_checker(told.parent))
    refuse_pickle(choice, spec.text, allow_pickle)
    return remote.fetch(spec.repo, spec.revision, found, choice.names, events, spec.text), found.commit


def _kind_of(names: Collection[str]) -> str:
    return "diffusion" if PIPELINE in names else "captioner"


def _kind_in(folder: Path) -> str:
    return _kind_of(file_names(folder))


def _layout(folder: Path, where: str, kind: str | None, safety: bool = False) -> Files:
    """Return which files of a folder are read."""
    if (kind or _kind_in(folder)) == "diffusion":
        return pipelines.choose_in(folder, where, safety=safety)
    return choose_in(folder, where)


def _cached(spec: ModelSpec, kind: str | None, safety: bool = False) -> tuple[Path, str] | None:
    """Return the cached snapshot of a hub model and its commit, or None if it is not there or not whole."""
    commit = remote.cached_commit(spec.repo, spec.revision)
    folder = remote.snapshot_folder(spec.repo, commit) if commit else None
    if commit is None or folder is None or not folder.is_dir() or not _whole(folder, kind, safety):
        return None
    return folder, commit


def _whole(folder: Path, kind: str | None = None, safety: bool = False) -> bool:
    """Return whether a snapshot has all that a model needs; other programs may have fetched a part only."""
    try:
        return _layout(folder, str(folder), kind, safety).complete
    except ModelError:
        return False


def _absent(spec: ModelSpec, message: str, checker: bool = False) -> ModelError:
    if checker:
        return ModelError(message, "when online, the same command fetches it; without --safety it is not needed")
    return ModelError(
        message, f"when online, `dbcap models pull {spec.text}` fetches it; `--profile starter` works without a hub"
    )


# ---- reports


def inspect(text: str, *, kind: str | None = None, offline: bool, events: Events, home: Path) -> ModelReport:
    """Return what is known about a model without fetching its weights. Raises `UsageError` or `ModelError`.

    `kind` is what it shall be loaded as; with None it is whichever it is, of several of a plugin the captioner.
    """
    spec = _parse(text)
    if spec.kind == "file" and spec.path is not None:
        return _inspect_file(spec, spec.path.absolute(), home)
    if spec.kind == "folder" and spec.path is not None:
        return _inspect_folder(spec, spec.path.absolute(), kind, home / "hashes.json")
    if spec.kind == "named":
        model = _named(spec, kind)
        report = _inspect_folder(spec, _own_folder(spec, model.kind), model.kind, home / "hashes.json")
        return replace(report, licence=model.licence or report.licence, description=model.description)
    return _inspect_hub(spec, kind, offline or remote.forbidden(), events)


def _inspect_folder(spec: ModelSpec, folder: Path, kind: str | None, memory: Path) -> ModelReport:
    choice, problem = None, ""
    try:
        choice = _layout(folder, spec.text, kind)
        names, revision = choice.names, fingerprint(folder, choice.names, memory)
    except ModelError as error:
        problem, revision = error.message, ""
        names = tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))
    return ModelReport(
        spec=spec,
        kind=kind_of(read_config(folder), file_names(folder)),
        model_type=_model_type(folder),
        revision=revision,
        files=_hashed(folder, names, memory),
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


def _inspect_hub(spec: ModelSpec, kind: str | None, offline: bool, events: Events) -> ModelReport:
    cached = _cached(spec, kind)
    message = f"{spec.text} is not in the cache, and --offline (or HF_HUB_OFFLINE) forbids to ask the hub"
    if not offline:
        try:
            found = remote.ask(spec.repo, spec.revision, timeout=_ASK_SECONDS, events=events)
        except HubOutOfReachError as error:
            message = f"{error.message}, and {spec.text} is not in the cache"
            events.detail(f"{error.message}: showing what is in the cache")
        else:
            return _inspect_remote(spec, kind, found, events)
    if not cached:
        raise _absent(spec, message)
    folder, commit = cached
    choice = _layout(folder, spec.text, kind)
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
        choice = _CHOOSERS[kind or _kind_of(found.files)](found.files, spec.text)
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
    if _kind_in(folder) == "diffusion":
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
            complete=_whole(revision.snapshot_path),
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
