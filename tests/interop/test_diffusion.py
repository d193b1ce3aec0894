"""Optimum runs an exported pipeline unchanged, and makes the pictures that dbcap makes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from environments import execute, optimum
from PIL import Image

from dbcap.config.models import CommonConfig, GenerateConfig
from dbcap.events import Silent
from dbcap.exporting import diffusion
from dbcap.generation.run import run
from dbcap.models.hub import locate

pytestmark = pytest.mark.interop

HERE = Path(__file__).parent
DIFFUSERS = "diffusers==0.35.2"
"""The last one that goes with transformers 4 and Optimum."""


@pytest.fixture(scope="module")
def python():
    """A Python with Optimum and diffusers."""
    found = optimum()
    if subprocess.run([found, "-c", "import diffusers"], capture_output=True, check=False).returncode:
        execute(found, "-m", "pip", "install", "--quiet", DIFFUSERS)
    return found


@pytest.fixture(params=["starter", pytest.param("xl", marks=pytest.mark.slow)])
def exported(request, tiny_xl, home, tmp_path):
    """The folder of an exported pipeline."""
    text = "starter" if request.param == "starter" else str(tiny_xl)
    local = locate(text, kind="diffusion", offline=True, events=Silent(), home=home)
    (tmp_path / "onnx").mkdir()
    diffusion.write(local, tmp_path / "onnx", "fp32")
    return tmp_path / "onnx"


def test_optimum_makes_the_same_picture(python, exported, tmp_path):
    side = 64
    words = ("a red dog", 6, 5, side, tmp_path / "optimum.npy")
    execute(python, HERE / "generate_optimum.py", exported, *words)
    settings = {"steps": 6, "guidance": 3.0, "seed": 5, "width": side, "height": side}
    config = GenerateConfig(prompts=("a red dog",), model=str(exported), out=str(tmp_path / "out"), **settings)
    assert run(config, CommonConfig(), Silent()).made == 1
    ours = np.array(Image.open(next((tmp_path / "out").glob("*.png"))).convert("RGB")).astype(int)
    assert np.abs(ours - np.load(tmp_path / "optimum.npy")).max() <= 1
