"""From what the user wrote after `--model` to a folder that `from_pretrained` can read, and what is known about it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dbcap.errors import DbcapError, ModelError, UsageError, did_you_mean
from dbcap.events import Events
from dbcap.models import exported, onnx_weights, pipelines, remote, single_file, trained
from dbcap.models.hashing import content_hash, fingerprint
from dbcap.models.layout import (
    CONFIG,
    PIPELINE,
    Files,
    choose,
    choose_in,
    count_in,
    file_names,
    has_weights,
    refuse_pickle,
)
from dbcap.models.remote import HubOutOfReachError, ModelFile
from dbcap.models.single_file import SingleFile
from dbcap.models.specs import FORMS, OF_RUN, ModelSpec, named_or_folder, parse
from dbcap.models.trained import Addition, Trained
from dbcap.plugins import loader
from dbcap.plugins.api import Model

_CHECK_SECONDS = 5.0
"""How long the hub may take to say whether a cached model has changed."""
ASK_SECONDS = 15.0

CHOOSERS: dict[str, Callable[[Collection[str], str], Files]] = {
    "captioner": choose,
    "diffusion": pipelines.choose,
    "onnx": exported.choose,
    "diffusion-onnx": pipelines.choose_onnx,
}
"""Kind of model -> what says by their names which of its files are read."""
_OF_ONNX = {"onnx": "captioner", "diffusion-onnx": "diffusion"}


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
    additions: tuple[Addition, ...] = ()
    """LoRA and embedding files that a run trained: they belong to the model, which `folder` is without them."""
    trained: Trained | None = None
    """What run it is of, where it is of one."""
    onnx: tuple[Path, ...] = ()
    """Of an exported captioner the encoder's and the decoder's file, of an exported pipeline one for each part."""

    @property
    def parameters(self) -> int:
        """The number of weights of a pipeline. Raises `ModelError` for a damaged file."""
        if self.onnx:
            return onnx_weights.count(self.onnx)
        return count_in([self.single.path]) if self.single else pipelines.count_parameters(self.folder)


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
    `kind` is what it must be; with None it is whichever it is, of several of a plugin the captioner. "onnx" is a
    captioner by its ONNX files, and "diffusion-onnx" a pipeline by its; "captioner" and "diffusion" take them where
    there are no other weights, or a variant is named.
    A commit that is cached, and anything with `offline`, asks nobody. A cached branch or tag is checked against the hub
    for a few seconds; if that does not answer, the cached one is used. Raises `UsageError` or `ModelError`.
    """
    spec = parsed(text)
    if spec.kind == "file":
        return _one_file(spec, kind, base, home)
    if base is not None:
        raise UsageError("--base goes with a model that is a .safetensors file", f"{text} has its own configs")
    if spec.kind == "run":
        how = {"safety": safety, "offline": offline, "allow_pickle": allow_pickle, "events": events, "home": home}
        return _of_run(spec, kind, how)
    if spec.kind == "hub":
        folder, commit = _from_hub(spec, kind, safety, offline or remote.forbidden(), allow_pickle, events)
        choice = layout_of(folder, spec.text, kind, safety)
        revision, files = commit, tuple(remote.cached_file(folder, name) for name in choice.names)
    else:
        folder = own_folder(spec, kind)
        choice = layout_of(folder, spec.text, kind, safety, spec.variant)
        refuse_pickle(choice, spec.text, allow_pickle)
        memory, images = home / "hashes.json", layout_of(folder, spec.text, kind, variant=spec.variant)
        revision, files = fingerprint(folder, images.names, memory), hashed(folder, choice.names, memory)
    if choice.pickled:
        from dbcap.models import weights  # it imports torch, which no other way through this file needs

        folder = weights.convert(folder, choice, cache=home, allow_pickle=allow_pickle, events=events)
    onnx = tuple(folder / name for name in choice.names if name.endswith(".onnx"))
    return LocalModel(spec, folder, revision, files, onnx=onnx)


# ---- runs


def _of_run(spec: ModelSpec, kind: str | None, how: Mapping[str, Any]) -> LocalModel:
    """Return what a run made; `how` is what `locate` was told."""
    if kind in ("captioner", "onnx"):
        raise ModelError(f"{spec.text} is a diffusion model, no captioner", "choose another --model")
    _refuse_onnx(spec, kind)
    found, home = trained.find(spec), how["home"]
    spec = replace(spec, text=found.address)
    if found.whole:
        return replace(locate(str(found.folder), kind="diffusion", **how), spec=spec, trained=found)
    trained.check(found, home / "hashes.json")
    base = _before(found, how)
    one = found.addition(home / "hashes.json")
    if one is None:
        folder = trained.assembled(found, base, home, how["safety"])
        return replace(locate(str(folder), kind="diffusion", **how), spec=spec, trained=found)
    file = ModelFile(one.path.name, one.path.stat().st_size, one.sha256)
    return replace(base, spec=spec, files=(*base.files, file), additions=(*base.additions, one), trained=found)


def _before(found: Trained, how: Mapping[str, Any]) -> LocalModel:
    """Return the model that a run was trained on."""
    try:
        base = locate(found.model, kind="diffusion", base=found.base, **how)
    except DbcapError as error:
        message = f"{found.address} needs {found.model}, which it was trained on: {error.message}"
        raise ModelError(message, error.hint) from error
    if base.revision != found.revision:
        how["events"].warn(
            f"{found.model} is not what {found.address} was trained on:"
            f" its hash was {found.revision[:12]} and is {base.revision[:12]}"
        )
    return base


# ---- plugins, folders and files


def _one_file(spec: ModelSpec, kind: str | None, base: str | None, home: Path) -> LocalModel:
    """Return a model in one file. The file with its configs and tokenizers is what its revision stands for."""
    if kind in ("captioner", "onnx"):
        raise UsageError(f"{spec.text} is a file, and a captioner is a folder", FORMS)
    _refuse_onnx(spec, kind)
    assert spec.path is not None
    found = single_file.read(spec.path.absolute())
    folder = single_file.folder_of(found, base, home)
    names, memory = pipelines.small_in(folder), home / "hashes.json"
    digest = content_hash(found.path, memory)
    revision = hashlib.sha256(f"{digest}\n{fingerprint(folder, names, memory)}".encode()).hexdigest()
    file = ModelFile(found.path.name, found.path.stat().st_size, digest)
    return LocalModel(spec, folder, revision, (*hashed(folder, names, memory), file), found)


def _refuse_onnx(spec: ModelSpec, kind: str | None) -> None:
    if kind == "diffusion-onnx":
        raise ModelError(f"{spec.text} has no ONNX files", f"`dbcap export {spec.text} --onnx` makes them")


def parsed(text: str) -> ModelSpec:
    _refuse_unknown_variant(text)
    spec = parse(text)
    return named_or_folder(spec, [model.name for model in loader.models()]) if spec.kind == "named" else spec


def _refuse_unknown_variant(text: str) -> None:
    """Raise what a folder that is a model says to a variant after its name that no folder has, as in ./model:int7."""
    written = os.path.expanduser(text)
    folder, _, variant = written.rpartition(":")
    if not folder or variant in exported.SUFFIXES or text.startswith(OF_RUN) or os.path.exists(written):
        return
    if any(os.path.isfile(os.path.join(folder, name)) for name in (CONFIG, PIPELINE)):
        layout_of(Path(folder), text, None, variant=variant)


def kinds(text: str) -> tuple[str, ...]:
    """Return the kinds of model that plugins have under this name, the one that counts first. Raises `UsageError`."""
    spec = parsed(text)
    return tuple(sorted(model.kind for model in loader.models() if spec.kind == "named" and model.name == spec.name))


def of_plugin(spec: ModelSpec, kind: str | None) -> Model:
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


def own_folder(spec: ModelSpec, kind: str | None) -> Path:
    """Return the folder of a plugin's model, or the one that the user named."""
    if spec.path is not None:
        return spec.path.absolute()
    folder = of_plugin(spec, _OF_ONNX.get(kind or "", kind)).folder
    if not folder.is_dir():
        raise ModelError(f"the folder of the model {spec.name} is missing: {folder}", "install its plugin again")
    return folder.absolute()


def hashed(folder: Path, names: Collection[str], memory: Path) -> tuple[ModelFile, ...]:
    return tuple(ModelFile(name, (folder / name).stat().st_size, content_hash(folder / name, memory)) for name in names)


# ---- the hub


def _from_hub(
    spec: ModelSpec, kind: str | None, safety: bool, offline: bool, allow_pickle: bool, events: Events
) -> tuple[Path, str]:
    """Return the folder of the snapshot and its commit."""
    cached = in_cache(spec, kind, safety)
    if cached and (offline or remote.COMMIT.fullmatch(spec.revision)):
        return cached
    checker = not cached and safety and in_cache(spec, kind) is not None  # nothing else is missing
    missing = f"the safety checker of {spec.text}" if checker else spec.text
    if offline:
        message = f"{missing} is not in the cache, and --offline (or HF_HUB_OFFLINE) forbids to fetch it"
        raise absent(spec, message, checker, kind)
    try:
        found = remote.ask(spec.repo, spec.revision, timeout=_CHECK_SECONDS if cached else ASK_SECONDS, events=events)
    except HubOutOfReachError as error:
        if cached:
            events.detail(f"{error.message}: using {spec.text} as it is in the cache ({cached[1][:12]})")
            return cached
        raise absent(spec, f"{error.message}, and {missing} is not in the cache", checker, kind) from error
    except ModelError as error:
        if cached:
            events.warn(f"{error.message}: using {spec.text} as it is in the cache ({cached[1][:12]})")
            return cached
        raise
    choice = CHOOSERS[kind or kind_of_names(found.files)](found.files, spec.text)
    if safety and PIPELINE in found.files and kind != "diffusion-onnx":
        told = remote.small_file(spec.repo, found.commit, PIPELINE, events)
        choice = pipelines.choose(found.files, spec.text, safety=pipelines.has_checker(told.parent))
    refuse_pickle(choice, spec.text, allow_pickle)
    return remote.fetch(spec.repo, spec.revision, found, choice.names, events, spec.text), found.commit


def kind_of_names(names: Collection[str]) -> str:
    return "diffusion" if PIPELINE in names else "captioner"


def kind_in(folder: Path) -> str:
    return kind_of_names(file_names(folder))


def layout_of(folder: Path, where: str, kind: str | None, safety: bool = False, variant: str = "") -> Files:
    """Return which files of a folder are read. Raises `ModelError`, or `UsageError` for a variant it has not."""
    is_pipeline = (folder / PIPELINE).is_file()
    diffusion = (kind or kind_in(folder)) in ("diffusion", "diffusion-onnx")
    where = where.removesuffix(f":{variant}") if variant else where
    try:
        if diffusion:
            if is_pipeline and variant:
                raise UsageError(
                    f"{where} is a diffusion pipeline, whose folder has one precision", f"leave out :{variant}"
                )
            choice: Files = pipelines.choose_in(folder, where, safety=safety, onnx=kind == "diffusion-onnx")
        elif kind == "onnx" or variant or _is_export(folder):
            choice = exported.choose_in(folder, where, variant)
        else:
            return choose_in(folder, where)
        exported.check_sizes(folder, where, choice.names)
        return choice
    except ModelError as error:
        if is_pipeline == diffusion and exported.recorded(folder):
            raise ModelError(error.message, "it is an export and not whole: export the model again") from error
        raise


def _is_export(folder: Path) -> bool:
    names = exported.names_in(folder)
    return bool(exported.variants(names) or exported.recorded(folder)) and not has_weights(names)


def in_cache(spec: ModelSpec, kind: str | None, safety: bool = False) -> tuple[Path, str] | None:
    """Return the cached snapshot of a hub model and its commit, or None if it is not there or not whole."""
    commit = remote.cached_commit(spec.repo, spec.revision)
    folder = remote.snapshot_folder(spec.repo, commit) if commit else None
    if commit is None or folder is None or not folder.is_dir() or not whole(folder, kind, safety):
        return None
    return folder, commit


def whole(folder: Path, kind: str | None = None, safety: bool = False) -> bool:
    """Return whether a snapshot has all that a model needs; other programs may have fetched a part only."""
    try:
        return layout_of(folder, str(folder), kind, safety).complete
    except ModelError:
        return False


def absent(spec: ModelSpec, message: str, checker: bool = False, kind: str | None = None) -> ModelError:
    if kind in _OF_ONNX and in_cache(spec, _OF_ONNX[kind]):
        return ModelError(
            f"{spec.text} has no ONNX files in the cache",
            f"`dbcap export {spec.text} --onnx` makes them of what is there",
        )
    if checker:
        return ModelError(message, "when online, the same command fetches it; without --safety it is not needed")
    return ModelError(
        message, f"when online, `dbcap models pull {spec.text}` fetches it; `--profile starter` works without a hub"
    )
