"""Encoders and decoders of other families export as those of ViT, GPT-2 and BERT do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from dbcap import Captioner
from dbcap.testing.models import write_tiny

PAIRS = [
    pytest.param(("deit", "gpt2"), marks=pytest.mark.slow),
    pytest.param(("beit", "bert"), marks=pytest.mark.slow),
    pytest.param(("vit", "roberta"), marks=pytest.mark.slow),
    pytest.param(("swin", "trocr"), marks=pytest.mark.slow),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_beams": 3, "num_captions": 2},
    {"min_length": 5, "max_length": 9, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
]


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def model(request, tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "-".join(request.param), *request.param)


@pytest.fixture(scope="module")
def exported(model, export, tmp_path_factory) -> Path:
    return export(model, tmp_path_factory.mktemp("exported") / model.name, int8=True)


@pytest.fixture(scope="module")
def pictures() -> Any:
    return np.random.default_rng(0).integers(0, 256, (8, 40, 52, 3), np.uint8)


def test_float32_says_what_torch_says(model, exported, pictures):
    """Of RoBERTa and TrOCR transformers' own search draws other samples, so that they are not compared."""
    plain, ours = Captioner.load(model, dtype="float32"), Captioner.load(f"{exported}:fp32")
    for options in OPTIONS:
        expected, found = (one.caption(pictures, **options) for one in (plain, ours))
        assert [one.text for one in found] == [one.text for one in expected]
        assert np.allclose([one.score for one in found], [one.score for one in expected], atol=1e-4)
        assert len({one.text for one in found}) > 1


def test_int8_is_quantised_whole_and_depends_on_no_other_image(exported, pictures):
    captioner = Captioner.load(f"{exported}:int8")
    together = [one.text for one in captioner.caption(pictures, batch_size=8, num_beams=2)]
    assert [one.text for one in captioner.caption(pictures, batch_size=3, num_beams=2)] == together
    assert [captioner.caption(picture, num_beams=2).text for picture in pictures] == together
    nodes = onnx.load(exported / "onnx" / "decoder_model_merged_int8.onnx").graph.node
    assert sum(node.op_type == "MatMulNBits" for node in nodes) >= 2 * 6 + 1
    assert not any(node.op_type == "Gemm" for node in nodes)
