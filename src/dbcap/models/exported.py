"""Which ONNX files of an exported captioner are read: the layout of transformers.js, or Optimum's with one variant."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dbcap.errors import ModelError, UsageError
from dbcap.models.layout import PIPELINE, Choice, read_object, small_of

SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8", "q4": "_q4"}
"""Variant, as `--model FOLDER:int8` names it -> what its files have before their ending, in the order of sizes."""
PREFERRED = ("int8", "fp32", "fp16", "q4")
"""What is taken of a folder when nothing is said."""
FOLDER = "onnx"
MANIFEST = "export.json"
"""What `dbcap export` says of a folder that it wrote."""
MODEL = "dbcap.model"
"""The key in a graph's metadata of what it was made of, which is equal in both halves."""
EXTERNAL = "_data"
"""What the file with the weights beside a large graph has after its ending."""


def files_of(variant: str) -> tuple[str, str]:
    """Return the names of the encoder's and the decoder's file, inside `FOLDER`."""
    suffix = SUFFIXES[variant]
    return f"encoder_model{suffix}.onnx", f"decoder_model_merged{suffix}.onnx"


def variants(names: Collection[str], standard: str = "fp32") -> dict[str, tuple[str, str]]:
    """Return the variants that are there, of the paths inside a folder: name -> the two files.

    `standard` is the one that Optimum's layout has, whose files have standard names, and not in `FOLDER`.
    """
    found: dict[str, tuple[str, str]] = {}
    places = [(variant, f"{FOLDER}/", variant) for variant in SUFFIXES] + [(standard, "", "fp32")]
    for variant, folder, named in places:
        encoder, decoder = (folder + name for name in files_of(named))
        if encoder in names and decoder in names:
            found.setdefault(variant, (encoder, decoder))
    return found


def choose(names: Collection[str], where: str, variant: str = "", standard: str = "fp32") -> Choice:
    """Return which files are read; `standard` as in `variants`.

    Raises `ModelError`, naming `where`, without ONNX files of a captioner, `UsageError` without that variant.
    """
    found = variants(names, standard)
    if not found and PIPELINE in names:
        raise ModelError(f"{where} is a diffusion pipeline, no captioner", "choose another --model")
    if not found:
        raise ModelError(f"{where} has no ONNX files", f"`dbcap export {where} --onnx` makes them")
    if variant and variant not in found:
        raise UsageError(f"{where} has no variant {variant}", f"there is {', '.join(found)}")
    files = found[variant or next(one for one in PREFERRED if one in found)]
    external = [f"{name}{EXTERNAL}" for name in files if f"{name}{EXTERNAL}" in names]
    return Choice(small_of(names), (*files, *external))


def choose_in(folder: Path, where: str, variant: str = "") -> Choice:
    """Return which files of `folder` are read, as `choose`; raises `ModelError` too for half of what would be."""
    names = names_in(folder)
    for one in (variant,) if variant else PREFERRED:
        files = [f"{FOLDER}/{name}" for name in (files_of(one) if one in SUFFIXES else ())]
        there = [name for name in files if name in names]
        if len(there) == 1:
            missing = next(name for name in files if name not in names)
            raise ModelError(f"{where} has {there[0]}, but not {missing}", "copy it again, or remove the other one too")
        if there:
            break
    return choose(names, where, variant, standard_in(folder))


def standard_in(folder: Path) -> str:
    """Return which variant the files with standard names are that are not in `FOLDER`; see `variants`."""
    told = str(recorded(folder).get(files_of("fp32")[0], {}).get("variant"))
    return told if told in SUFFIXES else "fp32"


def check_sizes(folder: Path, where: str, names: Collection[str]) -> None:
    """Raise `ModelError` for one of these files whose size is not what the manifest says."""
    told = recorded(folder)
    for name in names:
        size = (folder / name).stat().st_size
        if (wanted := told.get(name, {}).get("size", size)) != size:
            what = f"{where}: {name} has {size} bytes, and {wanted} by its {MANIFEST}"
            raise ModelError(what, "copy the folder again")


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what the manifest of a folder says of its ONNX files, by their names; nothing without a manifest."""
    try:
        files = read_object(folder / MANIFEST)["files"]
        return {one["name"]: dict(one) for one in files if one["name"].endswith(".onnx")}
    except (ModelError, LookupError, TypeError, ValueError, AttributeError):
        return {}


def names_in(folder: Path) -> set[str]:
    """Return the files of a folder, and of its folder with ONNX files."""
    inside = (path for path in (folder / FOLDER).glob("*") if path.is_file())
    direct = (path for path in folder.iterdir() if path.is_file())
    return {path.relative_to(folder).as_posix() for path in (*direct, *inside)}


def split(text: str) -> tuple[str, str]:
    """Return a folder and the variant that is named after it, as in ./model:int8; an empty one where none is."""
    match = re.fullmatch(rf"(?s)(.+):({'|'.join(SUFFIXES)})", text)
    return (match[1], match[2]) if match else (text, "")
