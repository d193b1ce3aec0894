"""Which ONNX files of an exported captioner are read: the layout of transformers.js, or Optimum's with one variant."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from dbcap.errors import ModelError, UsageError
from dbcap.models.layout import Choice, small_of

SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8", "q4": "_q4"}
"""Variant, as `--model FOLDER:int8` names it -> what its files have before their ending, in the order of sizes."""
PREFERRED = ("int8", "fp32", "fp16", "q4")
"""What is taken of a folder when nothing is said."""
FOLDER = "onnx"
EXTERNAL = "_data"
"""What the file with the weights beside a large graph has after its ending."""


def files_of(variant: str) -> tuple[str, str]:
    """Return the names of the encoder's and the decoder's file, inside `FOLDER`."""
    suffix = SUFFIXES[variant]
    return f"encoder_model{suffix}.onnx", f"decoder_model_merged{suffix}.onnx"


def variants(names: Collection[str]) -> dict[str, tuple[str, str]]:
    """Return the variants that are there, of the paths inside a folder: name -> the two files."""
    found: dict[str, tuple[str, str]] = {}
    for variant in SUFFIXES:
        for folder in (f"{FOLDER}/", "") if variant == "fp32" else (f"{FOLDER}/",):
            encoder, decoder = (folder + name for name in files_of(variant))
            if encoder in names and decoder in names:
                found.setdefault(variant, (encoder, decoder))
    return found


def choose(names: Collection[str], where: str, variant: str = "") -> Choice:
    """Return which files are read. Raises `ModelError`, naming `where`, without ONNX files or without that variant."""
    found = variants(names)
    if not found:
        raise ModelError(f"{where} has no ONNX files", f"`dbcap export {where} --onnx` makes them")
    if variant and variant not in found:
        raise UsageError(f"{where} has no variant {variant}", f"there is {', '.join(found)}")
    files = found[variant or next(one for one in PREFERRED if one in found)]
    external = [f"{name}{EXTERNAL}" for name in files if f"{name}{EXTERNAL}" in names]
    return Choice(small_of(names), (*files, *external))


def choose_in(folder: Path, where: str, variant: str = "") -> Choice:
    """Return which files of `folder` are read."""
    return choose(names_in(folder), where, variant)


def names_in(folder: Path) -> set[str]:
    """Return the files of a folder, and of its folder with ONNX files."""
    inside = (path for path in (folder / FOLDER).glob("*") if path.is_file())
    direct = (path for path in folder.iterdir() if path.is_file())
    return {path.relative_to(folder).as_posix() for path in (*direct, *inside)}


def split(text: str) -> tuple[str, str]:
    """Return a folder and the variant that is named after it, as in ./model:int8; an empty one where none is."""
    match = re.fullmatch(rf"(?s)(.+):({'|'.join(SUFFIXES)})", text)
    return (match[1], match[2]) if match else (text, "")
