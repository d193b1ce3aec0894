"""The output folder of a run: which images are there, what new ones are called, and writing them."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dbcap import __version__
from dbcap.config.models import GenerateConfig
from dbcap.errors import DbcapError, UsageError
from dbcap.events import Events
from dbcap.files import open_atomic
from dbcap.generation import jobs, pictures, schedulers, show
from dbcap.generation.manifest import NAME as MANIFEST
from dbcap.generation.manifest import Manifest
from dbcap.generation.plan import Given, Planned
from dbcap.inputs import shown
from dbcap.pixels import HOSTILE

if TYPE_CHECKING:
    from dbcap.models.families.description import Description


GRIDS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
"""Ending of a grid's name -> its format."""


class Gallery:
    """A folder of images with its manifest. `again` is the command that goes on, for what is said of a full disk."""

    def __init__(
        self,
        config: GenerateConfig,
        model: Description,
        given: Given,
        again: str,
        events: Events,
    ) -> None:
        self._config, self._again = config, again
        self._folder = Path(config.out)
        self._manifest = Manifest(self._folder)
        self._model, self._scheduler_config = model.title, model.scheduler_config
        self._names = {"run": model.run or jobs.slug(model.title), "step": model.step}
        self._facts: dict[str, Any] = {
            "model": model.address,
            **({"engine": "onnx"} if model.exported else {}),
            **({"base": os.path.abspath(os.path.expanduser(config.base))} if config.base else {}),
            **({"init": os.path.abspath(config.init)} if config.init else {}),
            **({"mask": os.path.abspath(config.mask)} if config.mask else {}),
            "lora": [str(one) for one in given.additions if not one.embedding and not one.own],
            "embedding": [str(one) for one in given.additions if one.embedding and not one.own],
            **({"low_memory": True} if config.low_memory else {}),
            **({"safety": True} if config.safety and model.has_checker else {}),
            "version": __version__,
        }
        self._shows = show.protocol(os.environ, sys.stderr is not None and sys.stderr.isatty()) if config.show else ""
        if config.show and not self._shows:
            events.say("--show: this is no terminal that is known to show images")

    def find(self, key: str) -> Path | None:
        """Return the image of a job, if it is there."""
        return self._manifest.find(key)

    def open(self, how: Mapping[str, Any]) -> None:
        """Make the folder. `how` is what all images say of how they were made."""
        self._facts |= how
        self._folder.mkdir(parents=True, exist_ok=True)

    def write(
        self, one: Planned, row: int, pixels: npt.NDArray[np.uint8], seconds: float
    ) -> tuple[Path, dict[str, Any]]:
        """Write the image of a job that stood at `row` of its batch; returns its path and all that is known about it.

        Raises DbcapError where it cannot be written; then nothing stands under its name.
        """
        job = one.job
        facts = {"key": job.key, "job": asdict(job), **self._facts, "row": row}
        sampler = schedulers.same_as(job.scheduler, self._scheduler_config)
        text = pictures.parameters(job, self._model, sampler, __version__)
        data = pictures.encoded(pixels, self._config.image_format, text, facts)
        path = self._folder / self._file_name(one)
        facts["seconds"] = seconds
        with self._writing(path), open_atomic(path) as file:
            file.write(data)
        with self._writing(self._folder / MANIFEST):
            self._manifest.add(job.key, path.name, facts)
        if self._shows:
            sys.stderr.write(show.sequence(Image.fromarray(pixels), self._shows))
            sys.stderr.flush()
        return path, facts

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            hint = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "look into that"
            message = f"cannot write {shown(str(path))}: {error.strerror or error}"
            raise DbcapError(message, f"{hint}; {self._again} goes on") from error

    def check_grid(self) -> None:
        """Raise UsageError for a --grid that would go over something else, or into a format that it has no name of."""
        path = Path(str(self._config.grid))
        if path.suffix.lower() not in GRIDS:
            raise UsageError(
                f"--grid {shown(str(path))} must end in {', '.join(GRIDS)}", "name it grid.png, for example"
            )
        if os.path.lexists(path) and not (path.is_file() and pictures.is_grid(path)):
            raise UsageError(f"--grid {shown(str(path))} is there, and is no grid of dbcap's", "choose another name")
        if not path.parent.is_dir() and path.parent != self._folder:
            raise UsageError(f"--grid: there is no folder {shown(str(path.parent))}", "make it, or choose another")

    def write_grid(self, planned: Sequence[Planned]) -> None:
        """Write all images of a plan side by side. Raises DbcapError where that cannot be written."""
        self.check_grid()  # again: an image may have been given that name meanwhile
        path = Path(str(self._config.grid))
        found = [self._manifest.find(one.job.key) for one in planned]
        opened = [_opened(one) for one in found if one]
        if not opened:
            return
        columns = self._config.num_images if self._config.num_images > 1 else None
        with self._writing(path), open_atomic(path) as file:
            pictures.write_grid(opened, columns, file, GRIDS[path.suffix.lower()])

    def _file_name(self, one: Planned) -> str:
        """Return a name that is free, or that of the image that is made anew."""
        ending = pictures.ENDINGS[self._config.image_format]
        before = self._manifest.find(one.job.key)
        if before and before.suffix == ending:
            return before.name
        fields = {
            "index": one.index,
            "seed": one.job.seed,
            "prompt": jobs.slug(one.job.prompt),
            "date": time.strftime("%Y-%m-%d"),
            **self._names,
        }
        stem = jobs.named(self._config.name, fields)
        number, name = 1, jobs.fitting(stem, ending)
        while self._manifest.taken(name):
            number += 1
            name = jobs.fitting(stem, f"-{number}{ending}")
        return name


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except HOSTILE as error:
        hint = "delete it: the same command makes it again"
        raise DbcapError(f"{shown(str(path))} cannot be read: {error}", hint) from error
