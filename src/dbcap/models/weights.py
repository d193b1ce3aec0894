"""Pickled weights, read by torch's loader that runs no code, and written once as safetensors into the cache.

`CACHE/converted/KEY/` holds the whole model, ready for `from_pretrained`: safetensors of what was pickled, and a copy
of all else that is read. KEY is the SHA-256 over the names and content hashes of what was read: an edited tokenizer or
configuration makes a new one.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dbcap.errors import ModelError
from dbcap.events import Events
from dbcap.files import in_units, sync_folder, sync_tree
from dbcap.models.hashing import fingerprint, is_blob
from dbcap.models.layout import CONFIG, Files, is_index, read_config, refuse_pickle
from dbcap.models.tensors import save_file
from dbcap.models.waiting import waiting_lock

State = dict[str, torch.Tensor]

_DAMAGED = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    zipfile.BadZipFile,
)
"""What the loader raises on bytes that make no sense."""


def convert(folder: Path, choice: Files, *, cache: Path, allow_pickle: bool, events: Events) -> Path:
    """Return a folder with the files `choice` of `folder`, in safetensors: itself if they are, else the converted copy.

    The conversion is made once and said; the copy keeps every tensor's type. Peak memory is one copy of one part's
    weights (mapped from the file where its format allows it). Safe with several processes. Raises `ModelError` for a
    file that holds more than tensors (such a file can run code, and is not read), a damaged one, and any if not
    `allow_pickle`.
    """
    if not choice.pickled:
        return folder
    refuse_pickle(choice, str(folder), allow_pickle)
    converted = cache / "converted"
    with _writing(converted):
        converted.mkdir(parents=True, exist_ok=True)
        target = converted / fingerprint(folder, choice.names, cache / "hashes.json")
        if target.is_dir():
            return target
        message = "another dbcap is converting weights: waiting for it"
        with waiting_lock(converted / ".lock", events, message):
            for leftover in converted.glob("*.tmp"):  # of conversions that were killed: ours is the only one alive
                shutil.rmtree(leftover)
            if not target.is_dir():
                _convert(folder, choice, target, events)
    return target


def _convert(folder: Path, choice: Files, target: Path, events: Events) -> None:
    size = in_units(sum((folder / name).stat().st_size for files in choice.pickled for name in files))
    first, *others = (files[0] for files in choice.pickled)
    what = f"{first} and {len(others)} more" if others else first
    events.say(f"converting the pickled {what} ({size}) to safetensors, once, without running any code")
    temporary = target.parent / f"{target.name[:16]}.tmp"  # ours alone: we hold the lock
    temporary.mkdir()
    try:
        for name in choice.names:
            (temporary / name).parent.mkdir(exist_ok=True)
        for name in choice.small:
            shutil.copyfile(folder / name, temporary / name)
        # What ties its embeddings has a configuration of its own: a captioner, and no part of a pipeline.
        config = read_config(folder) if CONFIG in choice.small else None
        for files in choice.pickled:
            _write(folder, files, config, temporary)
        for files in choice.sets:
            for name in files if files not in choice.pickled else ():
                _link_or_copy(folder / name, temporary / name)
        sync_tree(temporary)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(target.parent)


def _write(folder: Path, files: tuple[str, ...], config: Mapping[str, Any] | None, target: Path) -> None:
    """Write the weights in pickled files of `folder` as one file of safetensors in `target`."""
    state: State = {}
    for name in files:
        if not is_index(name):
            state.update(_read(folder / name))
    ready, aliases = _storable(state, config)
    part, _, name = files[0].rpartition("/")
    stem = name.partition(".")[0].removeprefix("pytorch_")  # pytorch_model.bin is model.safetensors to transformers
    save_file(ready, target / part / f"{stem}.safetensors", {"format": "pt", **aliases})


def _link_or_copy(file: Path, copy: Path) -> None:
    """Give `copy` the content of a file for good: without room for a second one where nobody writes to the first."""
    real = file.resolve()  # a link to the link would lead nowhere when the hub's cache is emptied
    if is_blob(real):
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(real, copy)
            return
    shutil.copyfile(real, copy)


def _read(file: Path) -> State:
    """Return the tensors in a pickled file, by name. Raises `ModelError` for anything else."""
    mapped = zipfile.is_zipfile(file)  # torch's format of 2020 and later; the older one is read as a whole
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the age of a file's format: it is read all the same
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if not _is_pickle(file):
            raise ModelError(f"{file} is damaged, or no file of weights", "fetch or copy the model again") from error
        raise _holds_code(file, str(error)) from error
    except _DAMAGED as error:
        if "TorchScript" in str(error):
            raise _holds_code(file, "TorchScript") from error
        raise ModelError(f"{file} is damaged, or no file of weights", "fetch or copy the model again") from error
    if not isinstance(loaded, Mapping):
        raise ModelError(f"{file} holds no weights but a {type(loaded).__name__}", "choose another model")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ModelError(f"{file} holds something that is no tensor: {name!r}", "choose another model")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ModelError(f"{file} holds a sparse or quantised tensor: {name}", "choose another model")
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _is_pickle(file: Path) -> bool:
    with file.open("rb") as opened:
        return zipfile.is_zipfile(file) or opened.read(1) == b"\x80"


def _holds_code(file: Path, refusal: str) -> ModelError:
    found = re.search(r"GLOBAL ([\w.]+)|(TorchScript)|type\(\)|unrecognized function ([^\n]+)", refusal)
    what = next((group for group in found.groups() if group), "") if found else ""
    return ModelError(
        f"{file} holds code{f' ({what})' if what else ''} beside weights, and is not read",
        "choose a model with safetensors, or one that holds nothing but weights",
    )


def _storable(state: State, config: Mapping[str, Any] | None) -> tuple[State, dict[str, str]]:
    """Return the tensors as safetensors can hold them, and which names were left out for which others.

    Tied weights, two names of one tensor, are stored once, under the first name, unless `config` says they are not
    tied, or is None. Other views of one memory block become tensors of their own.
    """
    blocks: dict[int, list[str]] = defaultdict(list)
    for name, tensor in state.items():
        if tensor.numel():
            blocks[tensor.untyped_storage().data_ptr()].append(name)
    ready = {name: tensor.contiguous() for name, tensor in state.items()}
    aliases: dict[str, str] = {}
    for names in blocks.values():
        kept: dict[tuple[Any, ...], str] = {}
        for name in names:
            tensor = state[name]
            view = (tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
            first = kept.setdefault(view, name)
            if first != name and config is not None and _tied(name, config):
                aliases[name] = first
                del ready[name]
            elif len(names) > 1 and name != names[0]:
                ready[name] = tensor.clone(memory_format=torch.contiguous_format)
    return ready, aliases


def _tied(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether the part of the model with this weight ties its embeddings, which is what transformers assumes.

    The top of an encoder-decoder's configuration speaks of tying its two halves, so the part's own word counts.
    """
    part = config.get(name.split(".", 1)[0])
    if isinstance(part, dict):
        return part.get("tie_word_embeddings") is not False
    return config.get("tie_word_embeddings") is not False


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn a failure to write the cache into a `ModelError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk in its own way
        raise ModelError(
            f"cannot convert weights into {folder}: {getattr(error, 'strerror', None) or error}",
            "make room there, or choose another place with DBCAP_HOME",
        ) from error
