"""What `--model` may say: a plugin's model, a run, a repository on the hub, a folder or a file. Nothing is fetched."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dbcap.errors import ModelError, UsageError
from dbcap.models import exported

FORMS = (
    "a model is a name such as starter, a hub model ORG/NAME or ORG/NAME@REVISION, a folder such as ./model,"
    " a .safetensors file, or a run such as run:NAME or run:NAME@last"
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_HUB = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9._/+-]*))?")
_RUN = re.compile(r"run:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,63})(?:@(?P<revision>last|best|[0-9]{1,9}))?")
_LONGEST_REPO = 96
_ENDING = ".safetensors"
_PATH_STARTS = ("/", "./", "../", "~")
OF_RUN = "run:"
FINAL = "final"
"""The revision of a run that names none: what it made in the end."""


@dataclass(frozen=True)
class ModelSpec:
    """A model by its address. `text` is what the user wrote; which other fields mean something depends on `kind`."""

    text: str
    kind: Literal["named", "run", "hub", "folder", "file"]
    name: str = ""
    """Of a run, or of a model that a plugin provides."""
    repo: str = ""
    """`org/name` on the hub."""
    revision: str = "main"
    """Branch, tag or commit on the hub; of a run a checkpoint's step, `last`, `best` or `final`."""
    path: Path | None = None
    variant: str = ""
    """Of a folder with ONNX files: the one that is named after it, as in ./model:int8."""


def parse(text: str) -> ModelSpec:
    """Return what `text` means, in this order.

    1. What begins with `run:` is what a run made, or one of its checkpoints.
    2. What looks like a path (`/x`, `./x`, `../x`, `~/x`, `x/`, `.`) is a folder or a single file, and so is what ends
       with .safetensors; it must exist. A folder with ONNX files may be followed by a variant, as in ./model:int8.
    3. A word without a slash is the name of a model that a plugin provides. Whether there is one is seen when the model
       is looked up; if there is none, a folder of that name is taken (see `named_or_folder`).
    4. With a slash inside, an existing folder wins; everything else is `org/name[@revision]` on the hub.

    Raises `UsageError` for a file and for what fits no form, `ModelError` for a path that does not exist.
    """
    if not text or text != text.strip() or "\0" in text:
        raise UsageError(f"{text!r} is no model", FORMS)
    if text.startswith(OF_RUN):
        return _run(text)
    if ":" in text and exported.split(text)[1]:
        return _local(text)
    if text in (".", "..") or text.startswith(_PATH_STARTS) or text.endswith(("/", _ENDING)):
        return _local(text)
    if "/" not in text:
        if not _NAME.fullmatch(text):
            raise UsageError(f"{text!r} is no model", FORMS)
        return ModelSpec(text, "named", name=text)
    if os.path.exists(text):
        return _local(text)
    return _hub(text)


def named_or_folder(spec: ModelSpec, names: list[str]) -> ModelSpec:
    """Return `spec`, or the folder of that name where no plugin provides a model of it. `names` are those provided."""
    if spec.kind == "named" and spec.name not in names and os.path.exists(spec.text):
        return _local(spec.text)
    return spec


def _run(text: str) -> ModelSpec:
    match = _RUN.fullmatch(text)
    if not match:
        raise UsageError(f"{text!r} is no model", "a run is written run:NAME, or run:NAME@STEP, @last or @best")
    return ModelSpec(text, "run", name=match["name"], revision=match["revision"] or FINAL)


def _local(text: str) -> ModelSpec:
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        return ModelSpec(text, "folder", path=path)
    folder, variant = exported.split(os.path.expanduser(text))
    if variant and os.path.isdir(folder):
        return ModelSpec(text, "folder", path=Path(folder), variant=variant)
    if os.path.exists(path) and text.endswith(_ENDING):
        return ModelSpec(text, "file", path=path)
    if os.path.exists(path):
        raise UsageError(f"{text} is a file, and of files dbcap reads {_ENDING}", FORMS)
    raise ModelError(f"no such {'file' if text.endswith(_ENDING) else 'folder'}: {text}", FORMS)


def _hub(text: str) -> ModelSpec:
    match = _HUB.fullmatch(text)
    if not match:
        near = re.match(r"https?://[^/]+/([^/]+/[^/]+)", text)
        raise UsageError(f"{text!r} is no model", f"write {near[1]}" if near else FORMS)
    repo, revision = match["repo"], match["revision"] or "main"
    if "--" in repo or ".." in repo or repo.endswith(".git") or len(repo) > _LONGEST_REPO:
        raise UsageError(f"{repo!r} cannot be the name of a model on the hub", FORMS)
    if ".." in revision or "//" in revision or revision.endswith(("/", ".lock")):
        raise UsageError(f"{revision!r} cannot be a revision of {repo}", FORMS)
    return ModelSpec(text, "hub", repo=repo, revision=revision)
