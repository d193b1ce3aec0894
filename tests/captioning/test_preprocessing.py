"""Preprocessing without torch gives the pixels of transformers' processors, number by number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil, DeiTImageProcessorPil, ViTImageProcessorPil

from dbcap.captioning.preprocessing import Preprocessing
from dbcap.errors import ModelError

SIZE = {"height": 32, "width": 24}
PROCESSORS: dict[str, Any] = {
    "resized": ViTImageProcessorPil(size=SIZE),
    "bicubic": ViTImageProcessorPil(size=SIZE, resample=3, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]),
    "not normalised": ViTImageProcessorPil(size=SIZE, do_normalize=False),
    "not rescaled": ViTImageProcessorPil(size=SIZE, do_rescale=False),
    "shorter edge and crop": CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 28, "width": 25}),
    "cropped with a border": CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 27, "width": 31}),
    "deit": DeiTImageProcessorPil(size=SIZE, crop_size={"height": 20, "width": 20}),
}


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize(("width", "height"), [(64, 64), (37, 90), (101, 33), (5, 7)])
def test_pixels_are_those_of_transformers(processor, width, height):
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(values)
    expected = processor(images=image, return_tensors="np")["pixel_values"][0]
    found = Preprocessing.of(processor.to_dict(), "it")(image)
    assert found.dtype == np.float32
    assert np.array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize(
    "config",
    [{}, {"size": {"longest_edge": 3}, "resample": 2}, {"size": 3, "resample": 2, "rescale_factor": "x"}],
    ids=["nothing", "another size", "no number"],
)
def test_configs_of_another_kind_are_refused(config):
    with pytest.raises(ModelError, match=r"it has a preprocessor_config\.json that dbcap does not know"):
        Preprocessing.of(config, "it")
