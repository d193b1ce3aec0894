"""`dataset.json`: what a data set was made of, and how. Beside it stand `train/*.png` and `train/metadata.jsonl`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dbcap.errors import DbcapError
from dbcap.files import write_atomic

NAME = "dataset.json"
FOLDER = "train"
FORMAT = 1
Source = Literal["written", "captioner", "template"]


@dataclass(frozen=True)
class Photo:
    """A prepared photo."""

    file: str
    """Its name in the folder `train`."""
    sha256: str
    """Of that file."""
    caption: str
    """The words themselves: no `[V]`, no `{class}`."""
    source: Source
    """Who wrote the caption: a person, the captioner, or the template."""
    origin: str
    """Path of the photo that it was made of."""
    origin_sha256: str
    width: int
    height: int
    edited: bool = False
    """The caption was changed in the data set itself: that one stays."""


@dataclass(frozen=True)
class ClassSettings:
    """What class images are: own photos in `folder`, or `count` that the model makes, prompt i mod P with seed i."""

    count: int
    prompts: tuple[str, ...]
    guidance: float
    steps: int
    folder: str | None = None


@dataclass(frozen=True)
class DataSet:
    """A data set. Without a class word there is no prior, and `classes` is None."""

    folder: Path
    model: str
    """What `--model` said, absolute where it was a path."""
    base: str | None
    size: int
    crop: str
    identifier: str
    class_word: str | None
    photos: tuple[Photo, ...]
    classes: ClassSettings | None
    warnings: tuple[str, ...] = ()

    def path_of(self, photo: Photo) -> Path:
        """Return where a photo lies."""
        return self.folder / FOLDER / photo.file

    def write(self, name: str = NAME) -> None:
        """Write `dataset.json`; bytes of a path that are no UTF-8 become JSON's own escape."""
        document = {"format": FORMAT, **{k: v for k, v in asdict(self).items() if k != "folder"}}
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        write_atomic(self.folder / name, text.encode("utf-8", "backslashreplace"))


def is_dataset(folder: Path) -> bool:
    """Return whether a folder is one that `dbcap prep` made."""
    return (folder / NAME).is_file()


def read(folder: Path, name: str = NAME) -> DataSet:
    """Read `dataset.json`. Raises DbcapError, naming it, where it is damaged."""
    path = folder / name
    try:
        said: dict[str, Any] = json.loads(path.read_bytes())
        if said.pop("format") != FORMAT:
            raise ValueError("another version of dbcap wrote it")
        said["photos"] = tuple(Photo(**one) for one in said["photos"])
        if strange := [one.file for one in said["photos"] if os.path.basename(one.file) != one.file]:
            raise ValueError(f"{strange[0]!r} is no plain file name")
        classes = said["classes"]
        if classes:
            said["classes"] = ClassSettings(**{**classes, "prompts": tuple(classes["prompts"])})
        said["warnings"] = tuple(said["warnings"])
        return DataSet(folder=folder, **said)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        hint = "`dbcap prep PHOTOS --out` another folder makes the data set anew"
        raise DbcapError(f"{path} is damaged: {error}", hint) from error
