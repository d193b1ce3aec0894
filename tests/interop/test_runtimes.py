"""Other runtimes run an exported captioner unchanged: transformers.js on Node, and Optimum's ONNX Runtime classes.

`make test-interop` runs these. They install both into `.interop/` from package registries, once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import environments
import numpy as np
import pytest
from environments import PLACE, execute
from PIL import Image

import dbcap_starter
from dbcap import Captioner
from dbcap.captioning.decoding import Decoding
from dbcap.config.models import CommonConfig, ExportConfig
from dbcap.events import Silent
from dbcap.exporting.run import run
from dbcap.testing.models import write_tiny

pytestmark = pytest.mark.interop

HERE = Path(__file__).parent
TRANSFORMERS_JS = "@huggingface/transformers@4.3.2"
LENGTH = 14


@pytest.fixture(scope="session")
def node() -> Path:
    """The script for transformers.js beside its packages."""
    folder = PLACE / "node"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "node_modules" / "@huggingface" / "transformers").is_dir():
        quick = {**os.environ, "ONNXRUNTIME_NODE_INSTALL_CUDA": "skip"}
        execute("npm", "install", "--no-audit", "--no-fund", "--silent", TRANSFORMERS_JS, where=folder, env=quick)
    script = folder / "caption.mjs"
    script.write_text((HERE / "caption.mjs").read_text())
    return script


@pytest.fixture(scope="session")
def optimum() -> Path:
    """A Python with Optimum and transformers 4."""
    return environments.optimum()


@pytest.fixture(scope="session", params=["starter", "swin and bert"])
def model(request, tmp_path_factory):
    """A model, its export, and pixels in a file with the tokens that torch makes of them, greedily and with 4 beams."""
    place = tmp_path_factory.mktemp("interop")
    source = "starter" if request.param == "starter" else str(write_tiny(place / "tiny", "swin", "bert"))
    formats = {"onnx": True, "int8": True, "int4": True, "check": False}
    exported = run(ExportConfig(models=(source,), out=str(place / "e"), **formats), CommonConfig(), Silent(), "").output
    captioner = Captioner.load(source, dtype="float32")._captioner
    paths = sorted(dbcap_starter.samples().glob("*.png"))[:6]
    pixels = np.stack([captioner.prepare(Image.open(path).convert("RGB")) for path in paths])
    told = {"data": pixels.ravel().tolist(), "dims": pixels.shape, "max_new_tokens": LENGTH}
    (place / "pixels.json").write_text(json.dumps(told))
    ends = captioner._special().ends
    tokens = {
        beams: [
            list(row[0].tokens)
            for row in captioner.search(pixels, Decoding(num_beams=beams, max_length=LENGTH + 1), [0] * 6)
        ]
        for beams in (1, 4)
    }
    return source, exported, place / "pixels.json", tokens, ends


def without_filling(rows, ends):
    """Return tokens up to the first end."""
    return [row[: next((n for n, token in enumerate(row) if n and token in ends), len(row)) + 1] for row in rows]


# transformers.js 4.3 feeds no cache to decoders that it does not know, BERT's among them.
@pytest.mark.parametrize("model", ["starter"], indirect=True)
@pytest.mark.parametrize("dtype", ["fp32", "int8", "q8", "q4"])
def test_transformers_js(node, model, dtype):
    _, exported, pixels, tokens, ends = model
    said = execute("node", node, exported, dtype, pixels, where=node.parent)
    found = without_filling(json.loads(said.splitlines()[-1]), ends)
    assert found == without_filling(tokens[1], ends)


@pytest.mark.parametrize("beams", [1, 4])
def test_optimum(optimum, model, beams):
    _, exported, pixels, tokens, ends = model
    said = execute(optimum, HERE / "caption_optimum.py", exported, pixels, beams)
    assert without_filling(json.loads(said), ends) == without_filling(tokens[beams], ends)


def test_optimum_with_int8_in_its_own_layout(optimum, model, tmp_path):
    source, _, pixels, tokens, ends = model
    formats = {"int8": True, "fp32": False, "layout": "optimum", "check": False}
    config = ExportConfig(models=(source,), out=str(tmp_path / "o"), **formats)
    exported = run(config, CommonConfig(), Silent(), "").output
    found = without_filling(json.loads(execute(optimum, HERE / "caption_optimum.py", exported, pixels, 1)), ends)
    same = sum(one == other for one, other in zip(found, without_filling(tokens[1], ends), strict=True))
    assert same >= (5 if source == "starter" else 0)
    assert all(len(row) > 1 for row in found)
