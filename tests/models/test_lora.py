"""LoRA files in the ways they are written, against diffusers' own loader, and those that do not fit."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from dbcap.errors import UsageError
from dbcap.models.families import load
from dbcap.models.lora import read
from dbcap.testing.diffusion import write_diffusion

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
LAYERS = {
    f"unet.{BLOCK}.attn1.to_q": (64, 64, 4),
    f"unet.{BLOCK}.attn1.to_out.0": (64, 64, 2),
    f"unet.{BLOCK}.attn2.to_k": (64, 32, 3),
    "text_encoder.text_model.encoder.layers.1.self_attn.q_proj": (32, 32, 2),
}
"""Layer -> outputs, inputs and a rank of its own."""
ALPHA = 1.5
TO_Q = f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_diffusion(tmp_path_factory.mktemp("lora") / "sd")


@pytest.fixture(scope="module")
def pairs():
    """Return down and up of each layer."""
    random = torch.Generator().manual_seed(0)
    return {
        name: tuple(torch.randn(shape, generator=random) for shape in ((rank, inside), (out, rank)))
        for name, (out, inside, rank) in LAYERS.items()
    }


def kohya(pairs):
    found = {}
    for name, (down, up) in pairs.items():
        part, _, module = name.partition(".")
        flat = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + module.replace(".", "_")
        found |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(ALPHA)}
    return found, {}


def peft(pairs):
    found = {}
    for name, (down, up) in pairs.items():
        found |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return found, {
        "lora_adapter_metadata": json.dumps({"unet.lora_alpha": ALPHA, "unet.r": 4, "text_encoder.lora_alpha": ALPHA})
    }


def older(pairs):
    found = {}
    for name, (down, up) in pairs.items():
        found |= {f"{name}.lora.down.weight": down, f"{name}.lora.up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    return found, {}


def processors(pairs):
    found = {}
    for name, (down, up) in pairs.items():
        if name.startswith("unet."):
            attention, _, layer = name.removesuffix(".0").rpartition(".")
            found[f"{attention}.processor.{layer}_lora.down.weight"] = down
            found[f"{attention}.processor.{layer}_lora.up.weight"] = up
    return found, {}


def family(folder, dtype="float32"):
    return load(SimpleNamespace(spec=SimpleNamespace(text="it", kind="folder"), folder=folder), "cpu", dtype)


def weights(one):
    """Return the weights of both parts by layer, as LAYERS names them."""
    text = {f"text_encoder.text_model.{name}": value for name, value in one._text_encoders()[0].state_dict().items()}
    return {**{f"unet.{name}": value for name, value in one.unet.state_dict().items()}, **text}


@pytest.mark.parametrize("write", [kohya, peft, older, processors])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_way_of_writing_adds_what_the_paper_says(write, dtype, folder, pairs, tmp_path):
    tensors, metadata = write(pairs)
    save_file(tensors, tmp_path / "l.safetensors", metadata)
    before = weights(family(folder, dtype))
    one = family(folder, dtype)
    one.add_lora(tmp_path / "l.safetensors", 0.5)
    after = weights(one)
    for name, value in before.items():
        layer = name.removesuffix(".weight")
        if layer in LAYERS and not (write is processors and layer.startswith("text")):
            down, up = pairs[layer]
            rank = LAYERS[layer][2]
            alpha = rank if write is processors else ALPHA
            expected = (value.float() + 0.5 * alpha / rank * up @ down).to(value.dtype)
            torch.testing.assert_close(after[name], expected)
            assert not torch.equal(after[name], value)
        else:
            assert torch.equal(after[name], value), name


def test_kohyas_files_make_diffusers_weights(folder, pairs, tmp_path):
    in_unet = {name: pair for name, pair in pairs.items() if name.startswith("unet.")}
    save_file(kohya(in_unet)[0], tmp_path / "l.safetensors")
    one = family(folder)
    one.add_lora(tmp_path / "l.safetensors", 0.7)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "l.safetensors")
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unload_lora_weights()
    ours = one.unet.state_dict()
    for name, value in pipeline.unet.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


def test_files_add_up(folder, pairs, tmp_path):
    save_file(kohya(pairs)[0], tmp_path / "l.safetensors")
    twice, once = family(folder), family(folder)
    for _ in range(2):
        twice.add_lora(tmp_path / "l.safetensors", 0.5)
    once.add_lora(tmp_path / "l.safetensors", 1.0)
    for name, value in weights(once).items():
        torch.testing.assert_close(weights(twice)[name], value, rtol=1e-5, atol=1e-5)


def test_convolutions_have_pairs_too(folder, tmp_path):
    down, up = torch.randn(2, 32, 3, 3), torch.randn(64, 2, 1, 1)
    name = "lora_unet_down_blocks_1_resnets_0_conv1"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "l.safetensors")
    before = family(folder).unet.down_blocks[1].resnets[0].conv1.weight
    one = family(folder)
    one.add_lora(tmp_path / "l.safetensors", 1.0)
    after = one.unet.down_blocks[1].resnets[0].conv1.weight
    torch.testing.assert_close(
        after - before, torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down), rtol=1e-4, atol=1e-5
    )
    assert after.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"lora_unet_x.lora_mid.weight": 2}, "does not know what lora_unet_x.lora_mid.weight is"),
        ({"lora_unet_x.hada_w1_a": 2}, "does not know what lora_unet_x.hada_w1_a is"),
        ({"transformer.x.lora_A.weight": 2}, "no place for transformer.x.lora_A.weight"),
        ({"lora_te2_x.lora_down.weight": 2}, "is for a text_encoder_2, which this model has not"),
        ({"lora_unet_x.lora_down.weight": 2}, "x has one half only"),
        ({}, "holds no LoRA"),
    ],
)
def test_keys_that_fit_nothing_are_errors(tensors, words, tmp_path):
    save_file({name: torch.zeros(size, size) for name, size in tensors.items()}, tmp_path / "l.safetensors")
    with pytest.raises(UsageError, match=re.escape(words)):
        read(tmp_path / "l.safetensors", 1.0, {"unet": True, "text_encoder": True})


@pytest.mark.parametrize(
    ("name", "down", "up", "words"),
    [
        ("lora_unet_nowhere", (2, 8), (8, 2), "the unet of this model has no nowhere"),
        (
            f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q",
            (2, 8),
            (64, 2),
            "is (64, 2) x (2, 8), and that layer (64, 64)",
        ),
        (f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q", (2, 64), (64, 3), "is (64, 3) x (2, 64)"),
    ],
)
def test_pairs_that_fit_no_layer_are_errors(folder, tmp_path, name, down, up, words):
    tensors = {f"{name}.lora_down.weight": torch.zeros(down), f"{name}.lora_up.weight": torch.zeros(up)}
    save_file(tensors, tmp_path / "l.safetensors")
    one = family(folder)
    one.add_lora(tmp_path / "l.safetensors", 1.0)
    with pytest.raises(UsageError, match=re.escape(words)):
        _ = one.unet


def test_what_is_no_safetensors_file_is_one_line(tmp_path):
    (tmp_path / "l.safetensors").write_bytes(b"no")
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path / "l.safetensors", 1.0, {"unet": True})
