"""Tiny diffusion pipelines, and `dbcap generate` in this process and in others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dbcap.testing.diffusion import write_diffusion


@pytest.fixture(scope="session")
def tiny_inpainting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose denoiser takes a mask."""
    return write_diffusion(tmp_path_factory.mktemp("diffusion") / "inpainting", inpaints=True)


@pytest.fixture(scope="session")
def family() -> Callable[..., Any]:
    """Return a function that loads a folder's family object."""
    from dbcap.models.families import load

    def call(folder: Path, dtype: str = "float32") -> Any:
        local: Any = SimpleNamespace(spec=SimpleNamespace(text=folder.name), folder=folder)
        return load(local, "cpu", dtype)

    return call
