"""Latents of pictures, encoded once and kept on disk, by what they are made of and never by a loader's position."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save

from dbcap import images
from dbcap.errors import DbcapError, InputError
from dbcap.events import Events
from dbcap.files import write_atomic

PLACES = 5
"""Where a longer side is cut: at both ends and evenly between them."""
HELD_OUT = 0.9
"""Side of the middle of a picture that is kept for validation, against the whole."""
_FORMAT = 1


@dataclass(frozen=True)
class View:
    """A square of a picture that is shown in training: left, top, right, lower in pixels; mirrored or not."""

    box: tuple[int, int, int, int]
    mirrored: bool = False


@dataclass(frozen=True)
class Source:
    """A picture on disk, and the SHA-256 of its file."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class Latent:
    """The distribution of a view's latents: mean and deviation, each (C, h, w) float32."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def drawn(self, noise: torch.Tensor) -> torch.Tensor:
        """Return the latents (C, h, w) that standard normal noise of that shape makes of it."""
        return self.mean + self.deviation * noise


def views(width: int, height: int, *, flip: bool) -> list[View]:
    """Return all squares of a picture that training shows."""
    side = min(width, height)
    spare = max(width, height) - side
    starts = sorted({round(spare * number / (PLACES - 1)) for number in range(PLACES)})
    wide = width >= height
    boxes = [(at, 0, at + side, side) if wide else (0, at, side, at + side) for at in starts]
    return [View(box, mirrored) for box in boxes for mirrored in ((False, True) if flip else (False,))]


def held_out(width: int, height: int) -> View:
    """Return the square for validation: the middle, nearer than training ever shows it."""
    side = max(1, round(min(width, height) * HELD_OUT))
    left, top = (width - side) // 2, (height - side) // 2
    return View((left, top, left + side, top + side))


class Cache:
    """Latents in a folder. `load` gives the family that encodes; it is called when something is missing, once."""

    def __init__(self, folder: Path, vae_sha256: str, size: int, load: Callable[[], Any]) -> None:
        self._folder, self._vae, self._size, self._load = folder, vae_sha256, size, load
        self._family: Any = None

    def all_of(self, wanted: Sequence[tuple[Source, View]], events: Events) -> list[Latent]:
        """Return latents in this order; what is missing is encoded and kept."""
        missing = [pair for pair in wanted if not self._path(*pair).is_file()]
        if missing:
            with events.track("Encoding pictures", len(missing)) as tracker:
                for source, view in missing:
                    self._encode(source, view)
                    tracker.advance()
        found = [self._read(source, view) for source, view in wanted]
        self._family = None
        return found

    def _path(self, source: Source, view: View) -> Path:
        parts = (source.sha256, *view.box, view.mirrored, self._size, self._vae, _FORMAT)
        key = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()
        return self._folder / key[:2] / f"{key}.safetensors"

    def _read(self, source: Source, view: View) -> Latent:
        path = self._path(source, view)
        try:
            return _latent(path)
        except (OSError, SafetensorError, KeyError):  # whatever happened to it, it can be made again
            self._encode(source, view)
            return _latent(path)

    def _encode(self, source: Source, view: View) -> None:
        if self._family is None:
            self._family = self._load()
        try:
            read = images.read(source.path)
        except InputError as error:
            raise InputError(f"{source.path}: {error.message}", error.hint, kind=error.kind) from error
        if read.sha256 != source.sha256:
            raise DbcapError(f"{source.path} was changed just now", "run the same command again")
        picture = read.image.crop(view.box)
        if picture.size != (self._size, self._size):
            picture = picture.resize((self._size, self._size), Image.Resampling.LANCZOS)
        if view.mirrored:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mean, deviation = self._family.encode_distribution(torch.from_numpy(np.array(picture)))
        tensors = {"mean": mean.cpu().contiguous(), "deviation": deviation.cpu().contiguous()}
        write_atomic(self._path(source, view), save(tensors))


def _latent(path: Path) -> Latent:
    found = load(path.read_bytes())  # not a map of the file: what happens to that later is no concern of training
    return Latent(found["mean"], found["deviation"])
