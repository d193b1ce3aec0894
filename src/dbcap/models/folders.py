"""A pipeline as a folder in diffusers' layout: its own files, and other weights for some of its parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dbcap.errors import ModelError
from dbcap.models import pipelines
from dbcap.models.families.original import from_original
from dbcap.models.identity import Identity
from dbcap.models.layout import CONFIG, PIPELINE, read_object
from dbcap.models.parts import published
from dbcap.models.pipelines import CHECKER, IDENTITY
from dbcap.models.single_file import TEXTS, UNET, VAE
from dbcap.models.tensors import save_file

if TYPE_CHECKING:
    from dbcap.models.hub import LocalModel

State = Mapping[str, torch.Tensor]
_PLAIN = {"format": "pt"}
_NONE = [None, None]
"""How model_index.json says that there is no such part."""


def write(
    local: LocalModel,
    config_of: Callable[[str], Mapping[str, Any]],
    weights: Mapping[str, State],
    folder: Path,
    identity: Identity,
) -> None:
    """Fill an empty folder with a pipeline.

    `weights` are those of the parts that have others than the model `local`, by their names, and become float32. All
    else is as the model has it, number for number, out of one file too, for which `config_of` gives a part's config;
    but configs that name a format of numbers name float32. Raises OSError or SafetensorError.
    """
    choice = _files(local)
    assert weights.keys() <= choice.weights.keys()
    for name in choice.small:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(local.folder / name, folder / name)
    for part in choice.weights:
        path = folder / pipelines.weights_of(part)
        if part in weights:
            _save({published(name): one.float() for name, one in weights[part].items()}, path)
        elif local.single:
            _save(_unpacked(local, part, config_of(part)), path)
        else:
            _copy(local.folder / part, path)
        _say_float32(folder / part / CONFIG)
    if local.single:
        config = read_object(local.folder / "unet" / CONFIG) | {"in_channels": local.single.in_channels}
        write_json(folder / "unet" / CONFIG, config)
    write_json(folder / PIPELINE, _index(folder))
    if identity != Identity():
        write_json(folder / IDENTITY, identity.document())


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a config as model folders have them."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _save(state: State, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file(state, path, _PLAIN)


def _files(local: LocalModel) -> pipelines.PipelineFiles:
    """Return which small files and parts the new pipeline has: a safety checker where it is here."""
    if local.single:
        return pipelines.PipelineFiles(pipelines.small_in(local.folder), dict.fromkeys(local.single.parts, ()))
    try:
        choice = pipelines.choose_in(local.folder, local.spec.text, safety=True)
    except ModelError:  # the hub's cache has one only where it was asked for
        choice = pipelines.choose_in(local.folder, local.spec.text)
    return choice


def _copy(part: Path, path: Path) -> None:
    """Give `path` the weights of a part, whatever their file is called and in how many it is."""
    files = pipelines.weight_files(part)
    if len(files) == 1:
        shutil.copyfile(files[0], path)
    else:
        _save({name: one for file in files for name, one in load_file(file).items()}, path)


def _unpacked(local: LocalModel, part: str, config: Mapping[str, Any]) -> State:
    """Return the weights of a part that are in one file with all others."""
    assert local.single is not None
    start = {"unet": UNET, "vae": VAE, **TEXTS[local.single.kind]}[part]
    with safe_open(local.single.path, "pt") as file:
        # As it has them: a file of float16 may have an autoencoder of float32.
        state = {key: file.get_tensor(key) for key in file.keys() if key.startswith(start)}  # noqa: SIM118
    found = from_original(local.single.kind, {part: config}, state)[part]
    return found if part == "vae" else {published(name): one for name, one in found.items()}


def _say_float32(path: Path) -> None:
    """Have transformers load a part in float32, as diffusers does its own: by default it takes what the config says."""
    config = read_object(path)
    told = {key: "float32" if key in ("dtype", "torch_dtype") else value for key, value in config.items()}
    if told != config:
        write_json(path, told)


def _index(folder: Path) -> dict[str, Any]:
    """Return model_index.json without the parts that are not here, which diffusers would look for."""
    index = read_object(folder / PIPELINE)
    for name, value in index.items():
        if isinstance(value, list) and not (folder / name).is_dir():
            index[name] = _NONE
    if index.get(CHECKER) == _NONE:
        index["requires_safety_checker"] = False
    return index
