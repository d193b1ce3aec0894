"""A checkpoint is a folder: safetensors with weights and optimizer, and `state.json` with the SHA-256 of each.

It is written beside its place, synced and renamed; older ones go only after. There is no pickle in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file

from dbcap.errors import DbcapError
from dbcap.files import sha256_of, sync_folder
from dbcap.models.tensors import save_file
from dbcap.runs import BEST, STATE, Run

OPTIMIZER = "optimizer.safetensors"
WEIGHTS, AVERAGE = "weights", "ema"
_FORMAT = 1
_TENSOR = "tensor:"


class DamagedError(DbcapError):
    """A checkpoint is not what was written."""


class Folders(CheckpointIO):
    """Writes and reads checkpoints as Lightning makes them. `headers` go into the files of weights, by their part."""

    def __init__(self, headers: Mapping[str, dict[str, str]] | None = None) -> None:
        self._headers = dict(headers or {})

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:  # noqa: ARG002
        """Write one. Where that fails nothing stands at `path`, and other checkpoints are as they were."""
        place = Path(path)
        place.parent.mkdir(exist_ok=True)  # not its parents: a run that somebody removed stays removed
        temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".tmp", dir=place.parent))
        try:
            rest = dict(checkpoint)
            hashes = self._write_parts(temporary / WEIGHTS, rest.pop("state_dict"))
            hashes |= self._write_parts(temporary / AVERAGE, rest.pop("ema", {}))
            tensors: dict[str, torch.Tensor] = {}
            plain = _without_tensors(rest, "", tensors)
            hashes |= _write(temporary / OPTIMIZER, tensors, {})
            said = {"files": hashes, "lightning": plain}
            document = {"format": _FORMAT, "sha256": _digest(said), **said}
            _write_text(temporary / STATE, json.dumps(document, indent=1))
            sync_folder(temporary)
            os.chmod(temporary, 0o755)
            if place.exists():
                remove(place)
            temporary.rename(place)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(place.parent)

    def _write_parts(self, folder: Path, state: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Write a file for each part, which names begin with, and return their hashes."""
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in state.items():
            part, _, own = name.partition(".")
            parts.setdefault(part, {})[own] = tensor
        found: dict[str, str] = {}
        for part, tensors in parts.items():
            folder.mkdir(exist_ok=True)
            found |= _write(folder / f"{part}.safetensors", tensors, self._headers.get(part, {}))
        if found:
            sync_folder(folder)
        return found

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:  # noqa: ARG002
        """Read one whose hashes are right. Raises DamagedError."""
        folder = Path(path)
        document = verified(folder)
        try:
            tensors = load_file(folder / OPTIMIZER)
            found: dict[str, Any] = _with_tensors(document["lightning"], tensors)
        except (OSError, SafetensorError, LookupError) as error:
            raise _damaged(folder, str(error)) from error
        found["state_dict"] = read_weights(folder, WEIGHTS)
        if average := read_weights(folder, AVERAGE):
            found["ema"] = average
        return found

    def remove_checkpoint(self, path: Any) -> None:
        """Remove one: it is renamed first, so that nobody takes half of one for a whole."""
        remove(Path(path))


def read_weights(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint, or their average, by part and name."""
    return {
        f"{path.stem}.{name}": tensor
        for path in sorted((folder / kind).glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def verified(folder: Path) -> dict[str, Any]:
    """Return `state.json` of a checkpoint whose files are what was written. Raises DamagedError naming what is not."""
    try:
        document = json.loads((folder / STATE).read_bytes())
        said = {name: document[name] for name in ("files", "lightning")}
        if document["sha256"] != _digest(said):
            raise ValueError
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _damaged(folder, f"{STATE} is not what was written") from error
    for name, wanted in said["files"].items():
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            raise _damaged(folder, f"{name}: {error.strerror}") from error
        if found != wanted:
            raise _damaged(folder, f"{name} is not what was written")
    if document["format"] != _FORMAT:
        raise DbcapError(f"another version of dbcap wrote the checkpoint {folder}", "use that version")
    return dict(document)


def _digest(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _damaged(folder: Path, why: str) -> DamagedError:
    return DamagedError(f"the checkpoint {folder} is damaged: {why}", "an earlier one is used where there is one")


def place_of(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is."""
    return folder / f"{step:06d}"


def mark_best(folder: Path, step: int) -> None:
    """Make `best` a link to the checkpoint of a step, in the folder of all."""
    link, temporary = folder / BEST, folder / f".{BEST}.tmp"
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(place_of(folder, step).name)
    os.replace(temporary, link)
    sync_folder(folder)


def prune(run: Run, keep: int) -> None:
    """Remove all but the newest and the best, and what was left half-written."""
    there = run.steps()
    kept = {*list(there)[-keep:], run.best()}
    for step, folder in there.items():
        if step not in kept:
            remove(folder)
    tidy(run)


def tidy(run: Run) -> None:
    """Remove what was left half-written."""
    for path in run.checkpoints.glob(".[0-9]*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside(folder: Path) -> None:
    """Take a damaged checkpoint out of sight; it goes when the run goes on."""
    aside = folder.with_name(f".{folder.name}.damaged.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def remove(folder: Path) -> None:
    """Remove a checkpoint."""
    doomed = folder.with_name(f".{folder.name}.gone.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


# ---- what Lightning hands over: dicts, lists and tensors


def _without_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a value for JSON; tensors in it go to `tensors`, under their path, which stands in their place."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return _TENSOR + path
    if isinstance(value, Mapping):
        return {str(key): _without_tensors(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(item, f"{path}/{number}", tensors) for number, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path} is a {type(value).__name__}, which a checkpoint has no place for")


def _with_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, str) and value.startswith(_TENSOR):
        return tensors[value.removeprefix(_TENSOR)]
    if isinstance(value, dict):
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    return value


def _write(path: Path, tensors: Mapping[str, torch.Tensor], header: dict[str, str]) -> dict[str, str]:
    """Write a file, synced, and return its name within the checkpoint and its hash."""
    save_file(tensors, path, header)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256")
    name = path.name if path.name == OPTIMIZER else f"{path.parent.name}/{path.name}"
    return {name: digest.hexdigest()}


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
