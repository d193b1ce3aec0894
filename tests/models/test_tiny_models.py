"""The tiny models that all other tests stand on: real, quick, and not saying the same of every image."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from dbcap.testing.models import WORDS, write_published_layout, write_tiny, write_tiny_blip, write_tiny_git


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small are slower with more threads, much slower on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images():
    """Noise and plain colours."""
    generator = np.random.default_rng(0)
    arrays = [
        generator.integers(0, 256, (48, 64, 3), np.uint8)
        if number % 2
        else np.full((48, 64, 3), generator.integers(0, 256, 3), np.uint8)
        for number in range(8)
    ]
    return [Image.fromarray(array) for array in arrays]


def captions(folder, images):
    model_class, tokenizer = transformers.VisionEncoderDecoderModel, transformers.AutoTokenizer.from_pretrained(folder)
    if json.loads((folder / "config.json").read_bytes())["model_type"] != "vision-encoder-decoder":
        model_class = transformers.AutoModelForImageTextToText
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        tokens = model.eval().generate(pixel_values=pixels, max_length=16, num_beams=1, do_sample=False)
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


WRITERS = {
    "published": write_published_layout,
    "blip": write_tiny_blip,
    "git": write_tiny_git,
    **{
        f"{encoder}-{decoder}": lambda folder, seed=0, encoder=encoder, decoder=decoder: write_tiny(
            folder, encoder, decoder, seed
        )
        for encoder in ("vit", "deit", "beit", "swin")
        for decoder in ("gpt2", "bert", "roberta", "trocr")
    },
}


@pytest.mark.parametrize("name", WRITERS)
def test_captions_are_words_and_vary(name, tmp_path, images):
    torch.manual_seed(3)
    folder = WRITERS[name](tmp_path / "a", seed=0)
    assert torch.initial_seed() == 3
    said = captions(folder, images)
    assert len(set(said)) >= 5
    assert all(said)
    assert {word for line in said for word in line.split()} <= set(WORDS)
    assert captions(WRITERS[name](tmp_path / "b", seed=0), images) == said
    assert captions(WRITERS[name](tmp_path / "c", seed=1), images) != said


def test_some_captions_end_early(tmp_path, images):
    said = captions(write_tiny(tmp_path), images)
    assert len({len(line.split()) for line in said}) > 2


def test_the_published_layout_is_that_of_2022(tmp_path):
    folder = write_published_layout(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "merges.txt",
        "preprocessor_config.json",
        "pytorch_model.bin",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert "encoder.encoder.layer.0.attention.attention.query.weight" in state
    assert state["decoder.transformer.h.0.attn.bias"].dtype == torch.uint8
    tied = [state[f"decoder.{name}.weight"] for name in ("transformer.wte", "lm_head")]
    assert tied[0].data_ptr() == tied[1].data_ptr()


def test_a_real_tokenizer(shared, tmp_path):
    folder = write_published_layout(tmp_path, tokenizer=shared / "tokenizers/gpt2/tokenizer.json")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a man riding a wave").input_ids == [64, 582, 10311, 257, 6769]
    assert json.loads((folder / "config.json").read_bytes())["eos_token_id"] == 50256
