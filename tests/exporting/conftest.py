"""Tiny captioners, exported once for all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dbcap_starter
from dbcap.config.models import CommonConfig, ExportConfig
from dbcap.events import Silent
from dbcap.exporting.run import run
from dbcap.testing.models import write_tiny


@pytest.fixture(scope="session")
def samples() -> list[Path]:
    """The 24 pictures of the starter distribution."""
    return sorted(dbcap_starter.samples().glob("*.png"))


@pytest.fixture(scope="session")
def export() -> Callable[..., Path]:
    """Return a function that exports a model without a check, and returns the folder."""

    def call(model: Path, out: Path, **options: Any) -> Path:
        settings = {"models": (str(model),), "out": str(out), "check": False, **options}
        return run(ExportConfig(**settings), CommonConfig(), Silent(), "").output

    return call


@pytest.fixture(scope="session")
def gpt2(tiny_captioner, export, tmp_path_factory) -> Path:
    """ViT and GPT-2 in all variants."""
    out = tmp_path_factory.mktemp("exported") / "gpt2"
    return export(tiny_captioner, out, onnx=True, fp16=True, int8=True, int4=True)


@pytest.fixture(scope="session")
def swin_model(tmp_path_factory) -> Path:
    """Swin and BERT, of another width."""
    return write_tiny(tmp_path_factory.mktemp("swin"), "swin", "bert")


@pytest.fixture(scope="session")
def bert(swin_model, export, tmp_path_factory) -> Path:
    """The same, exported in float32 and int8."""
    return export(swin_model, tmp_path_factory.mktemp("exported") / "bert", int8=True)
