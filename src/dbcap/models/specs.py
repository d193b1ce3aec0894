"""What `--model` may say: a model of a plugin, a repository on the hub, a folder or a file. Nothing is fetched."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dbcap.errors import ModelError, UsageError

FORMS = (
    "a model is a name such as starter, a hub model ORG/NAME or ORG/NAME@REVISION, a folder such as ./model,"
    " or a .safetensors file"
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_HUB = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9._/+-]*))?")
_LONGEST_REPO = 96
_ENDING = ".safetensors"
_PATH_STARTS = ("/", "./", "../", "~")


@dataclass(frozen=True)
class ModelSpec:
    """A model by its address. `text` is what the user wrote; which other fields mean something depends on `kind`."""

    text: str
    kind: Literal["named", "hub", "folder", "file"]
    name: str = ""
    """Of a model that a plugin provides."""
    repo: str = ""
    """`org/name` on the hub."""
    revision: str = "main"
    """Branch, tag or commit on the hub."""
    path: Path | None = None


def parse(text: str) -> ModelSpec:
    """Return what `text` means, in this order.

    1. What looks like a path (`/x`, `./x`, `../x`, `~/x`, `x/`, `.`) is a folder or a single file, and so is what ends
       with .safetensors; it must exist.
    2. A word without a slash is the name of a model that a plugin provides. Whether there is one is seen when the model
       is looked up; if there is none, a folder of that name is taken (see `named_or_folder`).
    3. With a slash inside, an existing folder wins; everything else is `org/name[@revision]` on the hub.

    Raises `UsageError` for a file and for what fits no form, `ModelError` for a path that does not exist.
    """
    if not text or text != text.strip() or "\0" in text:
        raise UsageError(f"{text!r} is no model", FORMS)
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


def _local(text: str) -> ModelSpec:
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        return ModelSpec(text, "folder", path=path)
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
