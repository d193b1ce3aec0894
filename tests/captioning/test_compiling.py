"""--compile: what is compiled, what is left as it is, and what a compiler that fails looks like."""

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config

from dbcap.captioning.decoding import Decoding
from dbcap.errors import DbcapError
from dbcap.events import Silent
from dbcap.models import packed


@pytest.fixture
def told():
    """Return what was said, by whom it is told to."""

    class Ears(Silent):
        lines: list[str] = []  # noqa: RUF012

        def say(self, message):
            self.lines.append(message)

    Ears.lines = []
    return Ears()


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    counters.clear()


def captions(loaded, pixels):
    return [
        [one.text for one in row]
        for row in loaded.generate(pixels, Decoding(num_beams=2, max_length=8).as_dict(), [0] * len(pixels))
    ]


@pytest.mark.parametrize("model", ["blip_captioner", "git_captioner"])
def test_captions_are_those_of_the_model_without(model, load, told, request):
    folder = request.getfixturevalue(model)
    plain, compiled = load(folder), load(folder, events=told, compiled=True)
    size = plain.config.vision_config.image_size
    pixels = np.random.default_rng(0).normal(size=(4, 3, size, size)).astype(np.float32)
    assert captions(compiled, pixels) == captions(plain, pixels)
    assert counters["stats"]["unique_graphs"] >= 1
    assert told.lines == ["torch.compile compiles the encoder with the first batch; that takes a while"]


def test_packed_layers_are_not_compiled_and_that_is_said(tiny_captioner, load, told):
    compiled = load(tiny_captioner, events=told, compiled=True)
    captions(compiled, np.zeros((2, 3, 32, 32), np.float32))
    assert counters["stats"]["unique_graphs"] == 0
    assert len(told.lines) == 1
    assert told.lines[0].startswith("--compile is left out: on this CPU the engine's packed layers are faster")


def test_the_engine_is_compiled_where_its_layers_are_not_packed(tiny_captioner, load, told, monkeypatch):
    pixels = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    plain = captions(load(tiny_captioner), pixels)
    monkeypatch.setattr(packed, "can_pack", lambda _: False)
    compiled = load(tiny_captioner, events=told, compiled=True)
    assert captions(compiled, pixels) == plain
    assert counters["stats"]["unique_graphs"] >= 1


def test_a_compiler_that_fails_is_one_line(blip_captioner, load, monkeypatch):
    monkeypatch.setattr(config.cpp, "cxx", ("/nonexistent/g++",))
    monkeypatch.setattr(config, "force_disable_caches", True)
    loaded = load(blip_captioner, compiled=True)
    size = loaded.config.vision_config.image_size
    with pytest.raises(DbcapError, match=r"^torch\.compile failed: .*C") as caught:
        captions(loaded, np.zeros((2, 3, size, size), np.float32))
    assert "\n" not in str(caught.value)
    assert "without --compile" in str(caught.value)
