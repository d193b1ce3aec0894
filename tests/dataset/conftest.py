"""What the tests of data sets share: photos, and a small model to prepare them for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dbcap.events import Silent


class Told(Silent):
    """What was said, warned of and failed, and how much work was announced."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []
        self.failed: list[str] = []
        self.announced: list[int] = []

    def say(self, message):
        self.said.append(message)

    def warn(self, message):
        self.warned.append(message)

    def fail(self, message):
        self.failed.append(message)

    def track(self, title, total, unit="images"):
        self.announced.append(total)
        return super().track(title, total, unit)


@pytest.fixture
def told() -> type[Told]:
    """The class of events that remember what they were told."""
    return Told


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder with three photos, 80x60, 60x80 and 64x64, and nothing in common."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, (width, height) in enumerate([(80, 60), (60, 80), (64, 64)]):
        values = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def located(home) -> Callable[[Path], object]:
    """Return a function that locates a folder's model."""
    from dbcap.config.paths import cache_dir
    from dbcap.events import Silent
    from dbcap.models.hub import locate

    def call(folder: Path) -> object:
        return locate(str(folder), kind="diffusion", offline=True, events=Silent(), home=cache_dir())

    return call
