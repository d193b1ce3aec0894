"""bitsandbytes checkpoints say what transformers makes of them, in dbcap and in transformers."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file
from transformers import (
    BlipForConditionalGeneration,
    GitForCausalLM,
    GPT2Config,
    SwinConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D

import dbcap_starter
from dbcap import Captioner, images
from dbcap.captioning.captioner import count_parameters
from dbcap.captioning.loading import load_weights
from dbcap.errors import DbcapError, ModelError
from dbcap.exporting import bnb
from dbcap.models.hub import LocalModel
from dbcap.models.specs import parse

STARTER = Path(dbcap_starter.__file__).parent / "captioner"
CLASSES = {"blip_captioner": BlipForConditionalGeneration, "git_captioner": GitForCausalLM}
PACKED = (Linear4bit, Linear8bitLt)
OUTPUT = ["decoder.lm_head"]
BITS = pytest.mark.parametrize("bits", [4, 8])


def local_of(model: Path) -> LocalModel:
    return LocalModel(parse(str(model)), model, "", ())


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Return a function that writes the checkpoint of a model, once."""
    made: dict[tuple[Path, int], Path] = {}

    def call(model: Path, bits: int) -> Path:
        if (model, bits) not in made:
            folder = tmp_path_factory.mktemp("packed")
            bnb.write(local_of(model), folder, bits)
            made[model, bits] = folder
        return made[model, bits]

    return call


def tokens(model: Any, pixels: torch.Tensor) -> list[list[int]]:
    return model.generate(pixel_values=pixels.to(model.dtype), max_length=20).tolist()


# ---- what is written


@BITS
def test_the_starter_says_the_same_in_a_fraction_of_the_size(tmp_path, samples, bits):
    written = bnb.write(local_of(STARTER), tmp_path, bits)
    assert [(one.name, one.variant, one.share.of_all) for one in written] == [("model.safetensors", f"bnb{bits}", 1.0)]
    source, file = (folder / "model.safetensors" for folder in (STARTER, tmp_path))
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    table = 2 * 2 * 2000 * 256 / source.stat().st_size  # of words, which is stored in 16 bits as the source is
    assert file.stat().st_size / source.stat().st_size < bits / 16 + table
    assert count_parameters(tmp_path) == count_parameters(STARTER)
    plain, ours = (Captioner.load(folder, dtype="float32").caption(samples) for folder in (STARTER, tmp_path))
    assert sum(one.text == other.text for one, other in zip(plain, ours, strict=True)) >= 22


@BITS
def test_transformers_reads_the_same_weights_and_says_the_same(packed, samples, bits):
    folder = packed(STARTER, bits)
    theirs = VisionEncoderDecoderModel.from_pretrained(folder).eval()
    ours = load_weights(VisionEncoderDecoderModel, folder, "it", torch.float32).model
    layers = {name: one for name, one in theirs.named_modules() if isinstance(one, PACKED)}
    assert len(layers) == 6 * 6 + 3 * 7 + 1  # of the encoder, the decoder and the pooler
    for name, layer in layers.items():
        weight = dequantize_bnb_weight(layer.weight, layer.state if bits == 8 else None)
        module = ours.get_submodule(name)
        assert torch.equal(module.weight.T if isinstance(module, Conv1D) else module.weight, weight.float()), name
    prepare = Captioner.load(folder, dtype="float32")._captioner.prepare
    pixels = torch.stack([torch.from_numpy(prepare(images.read(path).image)) for path in samples[:8]])
    pairs = zip(tokens(theirs, pixels), tokens(ours, pixels), strict=True)
    assert sum(one == other for one, other in pairs) >= 7  # bitsandbytes rounds what it multiplies


@BITS
@pytest.mark.parametrize("model", ["tiny_captioner", "swin_model", "blip_captioner", "git_captioner"])
def test_every_family_is_read_by_both(packed, model, bits, request):
    source = request.getfixturevalue(model)
    folder = packed(source, bits)
    kind = CLASSES.get(model, VisionEncoderDecoderModel)
    theirs = kind.from_pretrained(folder)
    names = [name for name, one in theirs.named_modules() if isinstance(one, PACKED)]
    ours, plain = (load_weights(kind, path, "it", torch.float32).model for path in (folder, source))
    assert names
    for name in names:
        found, weight = (one.get_submodule(name).weight for one in (ours, plain))
        assert torch.nn.functional.cosine_similarity(found.flatten(), weight.flatten(), dim=0) > 0.99, name
    assert count_parameters(folder) == count_parameters(source)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 40, 52, 3), np.uint8)
    alone = [one.text for one in Captioner.load(folder).caption(pictures, batch_size=1)]
    assert [one.text for one in Captioner.load(folder).caption(pictures, batch_size=3)] == alone


def test_settings_and_processors_come_along(published_local, packed):
    folder = packed(published_local, 8)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["load_in_8bit"]
    for name in ("preprocessor_config.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (published_local / name).read_bytes()
    before, after = (Captioner.load(path)._captioner for path in (published_local, folder))
    assert before._special() == after._special()
    assert before.capabilities == after.capabilities


@pytest.fixture
def published_local(published_model, tmp_path):
    """The layout of 2022 in safetensors, as it is located: with settings in config.json and no generation config."""
    folder = tmp_path / "published"
    shutil.copytree(published_model, folder)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    state.pop("decoder.lm_head.weight")
    save_file({name: one.contiguous() for name, one in state.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def wide():
    """Return a function that makes a model of an encoder and a GPT-2 that is 64 wide."""

    def call(encoder: Any) -> Any:
        size = {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        text = GPT2Config(**size, add_cross_attention=True, is_decoder=True)
        return VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, text))

    return call


def test_layers_that_bitsandbytes_cannot_multiply_on_a_cpu_are_left_if_they_are_few(wide):
    size = {"image_size": 32, "patch_size": 8, "num_attention_heads": 2, "hidden_size": 64, "num_hidden_layers": 2}
    even, odd = ViTConfig(**size, intermediate_size=128), ViTConfig(**size, intermediate_size=100)
    assert bnb._awkward(wide(even), OUTPUT) == []
    assert bnb._awkward(wide(odd), OUTPUT) == []  # too many
    swin = SwinConfig(image_size=64, patch_size=4, embed_dim=32, depths=[1, 1, 3], num_heads=[2, 2, 2], window_size=4)
    found = bnb._awkward(wide(swin), OUTPUT)
    assert found
    assert all(name.startswith("encoder.encoder.layers.0.") for name in found)


# ---- what cannot be


@BITS
def test_without_bitsandbytes_it_says_what_to_install(tiny_captioner, tmp_path, monkeypatch, bits):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(DbcapError) as failure:
        bnb.write(local_of(tiny_captioner), tmp_path, bits)
    assert str(failure.value) == f"--torch-bnb{bits} needs bitsandbytes; run `pip install 'dbcap[bnb]'`"


def test_a_checkpoint_is_loaded_without_bitsandbytes(packed, monkeypatch):
    folder = packed(STARTER, 4)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert Captioner.load(folder).caption(np.zeros((8, 8, 3), np.uint8))


def test_other_models_are_refused(packed, tiny_diffusion, tiny_captioner, tmp_path):
    with pytest.raises(ModelError, match="is a diffusion model"):
        bnb.write(local_of(tiny_diffusion), tmp_path, 4)
    with pytest.raises(ModelError, match="is quantised already"):
        bnb.write(local_of(packed(STARTER, 4)), tmp_path, 8)
    shutil.copytree(tiny_captioner, tmp_path / "m")
    for name, told, words in (("a", {"model_type": "vit"}, "type vit"), ("b", {"quantization_config": {}}, "already")):
        config = json.loads((tiny_captioner / "config.json").read_text()) | told
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=words):
            bnb.write(local_of(tmp_path / "m"), tmp_path / name, 4)


def test_too_small_a_share_is_refused(tiny_captioner, tmp_path, monkeypatch):
    monkeypatch.setattr(bnb, "_awkward", lambda *_: ["encoder"])
    with pytest.raises(ModelError, match=r"only \d\d% of the weights"):
        bnb.write(local_of(tiny_captioner), tmp_path, 4)
    assert not list(tmp_path.iterdir())


def test_damage_is_one_line(packed, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(packed(STARTER, 4), folder)
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if name.endswith("c_attn.weight.absmax"))
    del state[name]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"cannot be loaded: the bitsandbytes state of .*c_attn\.weight is damaged$"):
        Captioner.load(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "gptq"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be loaded: it is quantised by gptq"):
        Captioner.load(folder)
