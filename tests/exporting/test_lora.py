"""LoRA files in kohya's and in diffusers' names: the same matrices to the bit, the same pictures, and no key lost."""

from __future__ import annotations

import json
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dbcap.errors import ModelError, UsageError
from dbcap.exporting.lora import NAMES, convert, spelled
from dbcap.models import identity, lora
from dbcap.models.layout import read_object
from dbcap.models.parts import published
from dbcap.models.tensors import save_file

ALPHAS = (1.0, 0.5, 3.0)


def pairs_of(folder, parts, dtype):
    """Return a LoRA in kohya's names for every linear layer and convolution, ranks and alphas taking turns."""
    random, found = torch.Generator().manual_seed(0), {}
    for start, part, kind in parts:
        module = kind.from_pretrained(folder / part)
        layers = [(path, one) for path, one in module.named_modules() if isinstance(one, nn.Linear | nn.Conv2d)]
        for number, (path, layer) in enumerate(layers):
            rank, shape = 1 + number % 3, tuple(layer.weight.shape)
            up = (shape[0], rank, *(1 for _ in shape[2:]))
            name = start + published(path).replace(".", "_")
            found[f"{name}.lora_down.weight"] = 0.2 * torch.randn(rank, *shape[1:], generator=random)
            found[f"{name}.lora_up.weight"] = 0.2 * torch.randn(up, generator=random)
            found[f"{name}.alpha"] = torch.tensor(ALPHAS[number % 3])
    return {name: tensor.to(dtype) for name, tensor in found.items()}


SD = (("lora_unet_", "unet", UNet2DConditionModel), ("lora_te_", "text_encoder", CLIPTextModel))


@pytest.fixture(scope="module")
def kohya(tiny_diffusion, tmp_path_factory):
    """Such a file in float16."""
    path = tmp_path_factory.mktemp("lora") / "kohya.safetensors"
    save_file(pairs_of(tiny_diffusion, SD, torch.float16), path, {"ss_network_dim": "3"})
    return path


def same(one, other):
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
    return True


def test_to_diffusers_and_back_is_the_same_to_the_bit(kohya, tmp_path):
    there, back, again = (tmp_path / f"{name}.safetensors" for name in ("there", "back", "again"))
    count = convert(kohya, there, "diffusers", None, {"dbcap.export": "{}"})
    assert count == len(load_file(kohya)) // 3 == len(load_file(there)) // 2
    convert(there, back, "kohya", None, {})
    assert same(kohya, back)
    convert(back, again, "diffusers", None, {})
    assert same(there, again)
    with safe_open(again, "pt") as file:
        said = file.metadata()
    assert (said["ss_network_dim"], said["dbcap.export"]) == ("3", "{}")
    alphas = json.loads(said["lora_adapter_metadata"])
    assert {alphas["unet.lora_alpha"], *alphas["unet.alpha_pattern"].values()} == set(ALPHAS)
    assert {alphas["unet.r"], *alphas["unet.rank_pattern"].values()} == {1, 2, 3}


def merged(family, folder, path, parts=("unet", "text_encoder")):
    one = family(folder)
    one.add_lora(path, 1.0)
    return {part: one.plain(part).state_dict() for part in parts}


def test_diffusers_reads_ranks_and_alphas_of_each_module(tiny_diffusion, kohya, family, tmp_path):
    """Its own reader of kohya's names leaves out alphas of single modules: what is compared is what kohya means."""
    convert(kohya, tmp_path / "diffusers.safetensors", "diffusers", None, {})
    expected = merged(family, tiny_diffusion, kohya)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_diffusion)
    pipeline.load_lora_weights(tmp_path / "diffusers.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    for part, state in expected.items():
        found = getattr(pipeline, part).state_dict()
        assert all(torch.allclose(found[name], tensor, atol=1e-5) for name, tensor in state.items())


def test_xl_with_its_original_names(tiny_xl, family, tmp_path):
    parts = (
        ("lora_unet_", "unet", UNet2DConditionModel),
        ("lora_te1_", "text_encoder", CLIPTextModel),
        ("lora_te2_", "text_encoder_2", CLIPTextModelWithProjection),
    )
    first, there, back, again = (tmp_path / f"{n}.safetensors" for n in ("first", "there", "back", "again"))
    save_file(pairs_of(tiny_xl, parts, torch.float32), first)
    unet = read_object(tiny_xl / "unet" / "config.json")
    convert(first, there, "diffusers", unet, {})
    convert(there, back, "kohya", unet, {})
    convert(back, again, "diffusers", unet, {})
    assert same(there, again)
    names = {name.partition(".")[0] for name in load_file(back)}
    assert "lora_te2_text_model_encoder_layers_0_self_attn_q_proj" in names
    assert any(name.startswith("lora_unet_input_blocks_") for name in names)
    assert not any("down_blocks" in name for name in names)
    every = ("unet", "text_encoder", "text_encoder_2")
    before = merged(family, tiny_xl, first, every)
    for path in (there, back):
        after = merged(family, tiny_xl, path, every)
        assert all(torch.equal(after[part][name], one) for part in before for name, one in before[part].items())


@pytest.mark.parametrize("name", ["input_blocks_4_1_transformer_blocks_1_attn2_to_k", "middle_block_1_proj_in"])
def test_xl_is_known_without_its_model(name, tmp_path):
    first, there, back = (tmp_path / f"{n}.safetensors" for n in ("first", "there", "back"))
    pair = {"lora_down.weight": torch.ones(2, 2048), "lora_up.weight": torch.ones(640, 2), "alpha": torch.tensor(1.0)}
    extra = {"lora_te2_text_model_encoder_layers_31_mlp_fc1." + end: tensor for end, tensor in pair.items()}
    save_file({**{f"lora_unet_{name}.{end}": tensor for end, tensor in pair.items()}, **extra}, first)
    convert(first, there, "diffusers", None, {})
    assert any(key.startswith(("unet.down_blocks.1.attentions.0.", "unet.mid_block.")) for key in load_file(there))
    convert(there, back, "kohya", None, {})
    assert same(first, back)


def test_every_module_is_spelled_out_as_it_was():
    widths = {"block_out_channels": (32, 64, 64, 64), "class_embed_type": "timestep"}
    text = CLIPTextConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    with torch.device("meta"):
        modules = [UNet2DConditionModel(**widths), CLIPTextModelWithProjection(text)]
    paths = [path for one in modules for path, layer in one.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert len(paths) > 250
    assert {word for path in paths for word in path.split(".") if not word.isdigit()} < NAMES
    wrong = [path for path in map(published, paths) if published(spelled(lora.flat(path))) != path]
    assert not wrong


PAIR = {"lora_down.weight": torch.ones(1, 8), "lora_up.weight": torch.ones(8, 1)}
TO_Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"lora_unet_x.lora_mid.weight": torch.ones(1)}, "is LoRA with a Tucker core"),
        ({"something.else": torch.ones(1)}, "does not know what something.else is"),
        ({f"lora_unet_foo_bar.{end}": tensor for end, tensor in PAIR.items()}, "no unet has a place for foo.bar"),
        ({f"unet.foo_bar.0.{end}": tensor for end, tensor in PAIR.items()}, "no unet has a place for foo_bar.0"),
        ({"other_x.lora_up.weight": torch.ones(1)}, "there is no place for other_x.lora_up.weight"),
    ],
)
def test_a_key_without_a_place_is_an_error(more, said, tmp_path):
    save_file({**{f"{TO_Q}.{end}": tensor for end, tensor in PAIR.items()}, **more}, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=re.escape(said)):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", None, {})
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"lora_unet_y.lora_up.weight": torch.ones(8, 1)}, "y has one half only"),
        (
            {"lora_unet_y.lora_up.weight": torch.ones(8, 2), "lora_unet_y.lora_down.weight": torch.ones(1, 8)},
            "no product",
        ),
    ],
)
def test_a_damaged_pair_is_the_fault_of_the_file(more, said, tmp_path):
    save_file({**{f"{TO_Q}.{end}": tensor for end, tensor in PAIR.items()}, **more}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=re.escape(said)):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", None, {})


def test_a_truncated_file_gives_the_exit_code_that_it_gives_generate(kohya, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(kohya.read_bytes()[:5000])
    with pytest.raises(ModelError, match="cannot be read") as caught:
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", None, {})
    with pytest.raises(ModelError, match="cannot be read") as other:
        identity.of_header(tmp_path / "a.safetensors")
    assert caught.value.exit_code == other.value.exit_code


def test_a_module_that_xl_has_not(tmp_path):
    keys = {f"unet.down_blocks.7.resnets.0.conv1.{end}": tensor for end, tensor in PAIR.items()}
    two = {f"text_encoder_2.text_model.encoder.layers.0.mlp.fc1.{end}": tensor for end, tensor in PAIR.items()}
    save_file(
        {name.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): one for name, one in (keys | two).items()},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(UsageError, match=r"XL's denoiser has no down_blocks\.7"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", None, {})
