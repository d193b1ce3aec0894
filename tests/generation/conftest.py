"""A tiny diffusion pipeline that only these tests need."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbcap.testing.diffusion import write_diffusion


@pytest.fixture(scope="session")
def tiny_inpainting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose denoiser takes a mask."""
    return write_diffusion(tmp_path_factory.mktemp("diffusion") / "inpainting", inpaints=True)
