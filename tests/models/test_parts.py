"""Parts of a pipeline are what diffusers and transformers load, or one clear line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from dbcap.errors import ModelError
from dbcap.models import parts
from dbcap.models.libraries import clear_errors
from dbcap.models.mapped import MappedWeights
from dbcap.models.pipelines import weight_files

PARTS = [
    ("sd", "unet", UNet2DConditionModel),
    ("sd", "vae", AutoencoderKL),
    ("sd", "text_encoder", CLIPTextModel),
    ("xl", "unet", UNet2DConditionModel),
    ("xl", "text_encoder_2", CLIPTextModelWithProjection),
]
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def load(kind, folder, dtype=torch.float32):
    where = f"the {folder.name} of here"
    with clear_errors("here"):
        weights = MappedWeights(weight_files(folder))
        if issubclass(kind, PreTrainedModel):
            return parts.transformers_model(kind, folder, weights, where, dtype)
        return parts.diffusers_model(kind, kind.load_config(folder), weights, where, dtype)


def refusal(kind, folder):
    with pytest.raises(ModelError) as failure:
        load(kind, folder)
    line = str(failure.value)
    assert "\n" not in line
    return line


def weights_of(folder):
    (path,) = folder.glob("*.safetensors")
    return path, load_file(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("pipeline", "part", "kind"), PARTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_part_is_bit_for_bit_that_of_from_pretrained(
    pipeline, part, kind, stored, dtype, tiny_diffusion, tiny_xl, tmp_path
):
    folder = shutil.copytree((tiny_xl if pipeline == "xl" else tiny_diffusion) / part, tmp_path / part)
    path, weights = weights_of(folder)
    save_file({name: tensor.to(stored) for name, tensor in weights.items()}, path, {"format": "pt"})
    wanted, found = kind.from_pretrained(folder, dtype=dtype).eval(), load(kind, folder, dtype)
    theirs, ours = wanted.state_dict(), found.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[name].dtype == theirs[name].dtype == dtype for name in theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    buffers = dict(wanted.named_buffers())
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in found.named_buffers())
    assert not found.training
    assert not any(one.requires_grad for one in found.parameters())


def old(name):
    for new, before in OLD.items():
        name = name.replace(f".attentions.0.{new}.", f".attentions.0.{before}.")
    return name


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_names_of_an_autoencoders_attention(convolutions, tiny_diffusion, tmp_path):
    folder = shutil.copytree(tiny_diffusion / "vae", tmp_path / "vae")
    path, weights = weights_of(folder)
    renamed = {}
    for name, tensor in weights.items():
        linear = old(name) != name and name.endswith("weight")
        renamed[old(name)] = tensor[..., None, None].contiguous() if linear and convolutions else tensor
    assert len(set(renamed) - set(weights)) == 16  # weight and bias of four layers, in encoder and decoder
    save_file(renamed, path, {"format": "pt"})
    found = load(AutoencoderKL, folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(("pipeline", "part", "kind"), PARTS, ids=lambda value: value if isinstance(value, str) else "")
def test_missing_weights_are_named(pipeline, part, kind, tiny_diffusion, tiny_xl, tmp_path):
    folder = shutil.copytree((tiny_xl if pipeline == "xl" else tiny_diffusion) / part, tmp_path / part)
    path, weights = weights_of(folder)
    first, second = sorted(weights)[:2]
    save_file({name: tensor for name, tensor in weights.items() if name != first}, path, {"format": "pt"})
    assert f"the {part} of here lacks the weight {first}, or has it" in refusal(kind, folder)
    left = {name: tensor for name, tensor in weights.items() if name not in (first, second)}
    save_file(left, path, {"format": "pt"})
    assert " and 1 more, or has it in another shape; " in refusal(kind, folder)


@pytest.mark.parametrize(("pipeline", "part", "kind"), PARTS, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("turned", [False, True])
def test_misshapen_weights_are_named(pipeline, part, kind, turned, tiny_diffusion, tiny_xl, tmp_path):
    """One that has as many numbers in another shape fits no better."""
    folder = shutil.copytree((tiny_xl if pipeline == "xl" else tiny_diffusion) / part, tmp_path / part)
    path, weights = weights_of(folder)
    name = next(name for name, tensor in weights.items() if tensor.ndim > 1 and tensor.shape[0] != tensor.shape[1])
    weights[name] = weights[name].transpose(0, 1).contiguous() if turned else weights[name][1:].contiguous()
    save_file(weights, path, {"format": "pt"})
    assert f"the {part} of here lacks the weight {name}, or has it in another shape;" in refusal(kind, folder)


def test_weights_that_a_part_does_not_know_are_left_out(tiny_diffusion, tmp_path):
    """Old text encoders have position_ids, which transformers has no use for."""
    for part, kind in (("text_encoder", CLIPTextModel), ("unet", UNet2DConditionModel)):
        folder = shutil.copytree(tiny_diffusion / part, tmp_path / part)
        path, weights = weights_of(folder)
        save_file({**weights, "text_model.embeddings.position_ids": torch.arange(16)[None]}, path, {"format": "pt"})
        wanted = kind.from_pretrained(tiny_diffusion / part).state_dict()
        found = load(kind, folder).state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("part", "kind"), [("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)])
def test_damaged_files_are_one_line(part, kind, tiny_diffusion, tmp_path):
    folder = shutil.copytree(tiny_diffusion / part, tmp_path / part)
    path, _ = weights_of(folder)
    content = path.read_bytes()
    for damage in (b"", b"x" * 100, content[:-1], content + b"x"):
        path.write_bytes(damage)
        assert refusal(kind, folder).startswith("here cannot be loaded: ")
    path.write_bytes(content)
    (folder / "config.json").write_text("{")
    assert "config.json" in refusal(kind, folder)
    (folder / "config.json").unlink()
    refusal(kind, folder)


def test_weights_of_another_configuration(tiny_diffusion, tmp_path):
    folder = shutil.copytree(tiny_diffusion / "unet", tmp_path / "unet")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
    assert "belongs to another config.json" in refusal(UNet2DConditionModel, folder)
