"""Fixtures of all tests: those that dbcap gives to plugin authors, and where this checkout's shared folder is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dbcap.testing import *  # noqa: F403 - pytest finds fixtures by name

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of photos and models beside the checkout; tests that need it are skipped elsewhere."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("there is no folder `shared` beside this checkout")
    return folder


@pytest.fixture(scope="session")
def tiny_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion pipeline of 32x32 pixels with random weights."""
    from dbcap.testing.diffusion import write_diffusion  # it loads torch and diffusers

    return write_diffusion(tmp_path_factory.mktemp("diffusion") / "sd")


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of SDXL."""
    from dbcap.testing.diffusion import write_diffusion  # it loads torch and diffusers

    return write_diffusion(tmp_path_factory.mktemp("diffusion") / "xl", xl=True)


@pytest.fixture(scope="session")
def family() -> Callable[..., Any]:
    """Return a function that loads a folder's family object."""
    from dbcap.models.families import load

    def call(folder: Path, dtype: str = "float32") -> Any:
        local: Any = SimpleNamespace(spec=SimpleNamespace(text=folder.name, kind="folder"), folder=folder)
        return load(local, "cpu", dtype)

    return call
