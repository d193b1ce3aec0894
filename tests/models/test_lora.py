"""LoRA files in the ways they are written, against diffusers' own loader, and those that do not fit."""

import json
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

from dbcap.errors import DbcapError, ModelError, UsageError
from dbcap.models import denoiser
from dbcap.models.families.original import unet_names
from dbcap.models.lora import read

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
LAYERS = {
    f"unet.{BLOCK}.attn1.to_q": (64, 64, 4, 1.5),
    f"unet.{BLOCK}.attn1.to_out.0": (64, 64, 2, 3.0),
    f"unet.{BLOCK}.attn2.to_k": (64, 32, 3, 1.5),
    "text_encoder.text_model.encoder.layers.1.self_attn.q_proj": (32, 32, 2, 0.5),
}
"""Layer -> outputs, inputs, a rank and an alpha of its own."""
TO_Q = f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q"
TO_K = f"lora_unet_{BLOCK.replace('.', '_')}_attn2_to_k"
CONV = "lora_unet_down_blocks_1_resnets_0_conv1"
PARTS = {"text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_", "unet": "lora_unet_"}
"""Part -> how kohya's names of the modules in it begin, where the encoder's own do not begin with text_model."""


@pytest.fixture(autouse=True)
def plain_layers(monkeypatch):
    """Leave layers as they are: the weights of packed ones cannot be read."""
    monkeypatch.setattr(denoiser, "speed_up", lambda *_: None)


@pytest.fixture(scope="module")
def pairs():
    """Return down and up of each layer."""
    random = torch.Generator().manual_seed(0)
    return {
        name: tuple(torch.randn(shape, generator=random) for shape in ((rank, inside), (out, rank)))
        for name, (out, inside, rank, _) in LAYERS.items()
    }


def kohya(pairs):
    found = {}
    for name, (down, up) in pairs.items():
        part, _, module = name.partition(".")
        flat = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + module.replace(".", "_")
        found |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        found[f"{flat}.alpha"] = torch.tensor(LAYERS[name][3])
    return found, {}


def peft(pairs):
    found = {}
    for name, (down, up) in pairs.items():
        found |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    config = {
        "unet.lora_alpha": 1.5,
        "unet.r": 4,
        "unet.alpha_pattern": {"to_out.0": 3},
        "text_encoder.lora_alpha": 0.5,
    }
    return found, {"lora_adapter_metadata": json.dumps(config)}


def older(pairs):
    found = {}
    for name, (down, up) in pairs.items():
        found |= {f"{name}.lora.down.weight": down, f"{name}.lora.up.weight": up}
        found[f"{name}.alpha"] = torch.tensor(LAYERS[name][3])
    return found, {}


def processors(pairs):
    found = {}
    for name, (down, up) in pairs.items():
        if name.startswith("unet."):
            attention, _, layer = name.removesuffix(".0").rpartition(".")
            found[f"{attention}.processor.{layer}_lora.down.weight"] = down
            found[f"{attention}.processor.{layer}_lora.up.weight"] = up
    return found, {}


def parts_of(one):
    """Return the modules of a family object, or of a pipeline of diffusers, that LoRA is for."""
    if hasattr(one, "text_parts"):
        names = [name for _, name, _ in one.text_parts]
        return dict(zip(names, one._text_encoders(), strict=True)) | {"unet": one.unet}
    return {name: getattr(one, name) for name in PARTS if hasattr(one, name)}


def weights(one):
    """Return the weights of all parts by layer, with the names that LAYERS has."""
    return {
        f"{part}.{'' if part == 'unet' else 'text_model.'}{name.removeprefix('text_model.')}": value
        for part, module in parts_of(one).items()
        for name, value in module.state_dict().items()
    }


def with_lora(one, path, scale):
    one.add_lora(path, scale)
    return one


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)


def changed(one, other):
    """Return how many weights are not equal."""
    return sum(not torch.equal(other[name], value) for name, value in one.items())


@pytest.mark.parametrize("write", [kohya, peft, older, processors])
@pytest.mark.parametrize(
    ("dtype", "of_file"), [("float32", "float32"), ("bfloat16", "float16"), ("float16", "bfloat16")]
)
def test_every_way_of_writing_adds_what_the_paper_says(write, dtype, of_file, family, tiny_diffusion, pairs, tmp_path):
    pairs = {name: tuple(half.to(getattr(torch, of_file)) for half in pair) for name, pair in pairs.items()}
    tensors, metadata = write(pairs)
    save_file(tensors, tmp_path / "l.safetensors", metadata)
    before = weights(family(tiny_diffusion, dtype))
    after = weights(with_lora(family(tiny_diffusion, dtype), tmp_path / "l.safetensors", 0.5))
    for name, value in before.items():
        layer = name.removesuffix(".weight")
        if layer in LAYERS and not (write is processors and layer.startswith("text")):
            down, up = (half.float() for half in pairs[layer])
            _, _, rank, alpha = LAYERS[layer]
            alpha = rank if write is processors else alpha
            expected = (value.float() + 0.5 * alpha / rank * up @ down).to(value.dtype)
            torch.testing.assert_close(after[name], expected)
            assert not torch.equal(after[name], value)
        else:
            assert torch.equal(after[name], value), name


# ---- every layer of a model, and diffusers' own loader


def pipeline(folder, xl):
    return (StableDiffusionXLPipeline if xl else StableDiffusionPipeline).from_pretrained(folder)


def by_diffusers(folder, xl, path):
    """Return the weights that diffusers makes of a file with a scale of 0.7."""
    one = pipeline(folder, xl)
    one.load_lora_weights(path)
    one.fuse_lora(lora_scale=0.7, components=list(parts_of(one)))
    one.unload_lora_weights()
    return weights(one)


def everywhere(one, original, alpha=None):
    """Return the tensors of a kohya file for every layer of a model, each with a rank (with None, an alpha) of its own.

    Of `original` layers, one has the name of original files, if it is the denoiser's; of 0, none.
    """
    random = torch.Generator().manual_seed(0)
    modules, names = parts_of(one), unet_names(one.unet)
    layers = [(part, path, layer) for part, module in modules.items() for path, layer in module.named_modules()]
    layers = [(part, path, layer.weight) for part, path, layer in layers if isinstance(layer, nn.Linear | nn.Conv2d)]
    found = {}
    for number, (part, path, weight) in enumerate(layers):
        name = names[path] if part == "unet" and original and number % original == 0 else path
        flat, rank = PARTS[part] + name.replace(".", "_"), 2 + number % 3
        ones = [1 for _ in weight.shape[2:]]
        found |= {
            f"{flat}.lora_down.weight": torch.randn(rank, *weight.shape[1:], generator=random),
            f"{flat}.lora_up.weight": torch.randn(len(weight), rank, *ones, generator=random),
            f"{flat}.alpha": torch.tensor(1.0 + number % 4 if alpha is None else alpha),
        }
    return found


@pytest.mark.parametrize(("xl", "original"), [(False, 0), (True, 0), (True, 1)])
def test_kohyas_files_make_diffusers_weights(xl, original, family, tiny_diffusion, tiny_xl, tmp_path):
    # With one alpha: diffusers 0.42 reads a second one for attention and text encoders, and uses the first.
    folder = tiny_xl if xl else tiny_diffusion
    tensors = everywhere(family(folder), original, 1.5)
    if not original:  # which it takes for one layer
        tensors = {name: tensor for name, tensor in tensors.items() if "add_embedding" not in name}
    save_file(tensors, tmp_path / "l.safetensors")
    ours = weights(with_lora(family(folder), tmp_path / "l.safetensors", 0.7))
    assert_close(by_diffusers(folder, xl, tmp_path / "l.safetensors"), ours)


ATTENTION = {"target_modules": ["to_q", "to_out.0"], "rank_pattern": {"to_q": 2}}
EVERY_WAY = {
    "target_modules": [*ATTENTION["target_modules"], "proj_in", "conv1"],
    "rank_pattern": {"to_q": 2},
    "alpha_pattern": {"attn1.to_q": 3, "^mid_block.resnets.0.conv1": 5, r"up_blocks\.\d+.*conv1": 7},
    "use_rslora": True,
}


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("xl", [False, True])
def test_diffusers_own_files_make_its_weights(xl, new, family, tiny_diffusion, tiny_xl, tmp_path):
    """New ones have peft's names and configs; those of its older scripts neither, and no convolutions."""
    folder = tiny_xl if xl else tiny_diffusion
    one = pipeline(folder, xl)
    torch.manual_seed(0)
    given = {}
    for part, module in parts_of(one).items():
        chosen = (EVERY_WAY if new else ATTENTION) if part == "unet" else {"target_modules": ["q_proj", "fc1"]}
        config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **chosen)
        inject_adapter_in_model(config, module)
        layers = get_peft_model_state_dict(module)
        given[f"{part}_lora_layers"] = layers if new else convert_state_dict_to_diffusers(layers)
        given[f"{part}_lora_adapter_metadata"] = config.to_dict() if new else None
    one.save_lora_weights(tmp_path, **given)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    theirs, before = by_diffusers(folder, xl, path), weights(family(folder))
    assert_close(theirs, weights(with_lora(family(folder), path, 0.7)))
    assert changed(theirs, before) == len(load_file(path)) / 2


@pytest.mark.parametrize("xl", [False, True])
def test_names_of_original_files_are_of_the_same_layers(xl, family, tiny_diffusion, tiny_xl, tmp_path):
    folder = tiny_xl if xl else tiny_diffusion
    made = []
    for original in (0, 2, 1):
        tensors = everywhere(family(folder), original)
        save_file(tensors, tmp_path / "l.safetensors")
        made.append(weights(with_lora(family(folder), tmp_path / "l.safetensors", 1.0)))
    assert any("_input_blocks_" in name for name in tensors)
    for other in made[1:]:
        assert changed(made[0], other) == 0
    assert changed(made[0], weights(family(folder))) == len(tensors) / 3


# ---- shapes


def test_files_add_up(family, tiny_diffusion, pairs, tmp_path):
    save_file(kohya(pairs)[0], tmp_path / "l.safetensors")
    twice, once = family(tiny_diffusion), family(tiny_diffusion)
    for _ in range(2):
        twice.add_lora(tmp_path / "l.safetensors", 0.5)
    once.add_lora(tmp_path / "l.safetensors", 1.0)
    assert_close(weights(once), weights(twice))


@pytest.mark.parametrize("name", [CONV, "lora_unet_input_blocks_3_0_in_layers_2"])
def test_convolutions_have_pairs_too(family, tiny_diffusion, tmp_path, name):
    down, up = torch.randn(2, 32, 3, 3), torch.randn(64, 2, 1, 1)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "l.safetensors")
    before = family(tiny_diffusion).unet.down_blocks[1].resnets[0].conv1.weight
    one = with_lora(family(tiny_diffusion), tmp_path / "l.safetensors", 1.0)
    after = one.unet.down_blocks[1].resnets[0].conv1.weight
    added = torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    torch.testing.assert_close(after - before, added, rtol=1e-4, atol=1e-5)
    assert after.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layer", ["proj_in", "transformer_blocks.0.attn1.to_q"])
def test_a_matrix_and_a_1x1_convolution_are_the_same(family, tiny_diffusion, tmp_path, layer):
    """Stable Diffusion 1 has convolutions where 2 and XL have matrices."""
    down, up = torch.randn(2, 64), torch.randn(64, 2)
    name = f"lora_unet_mid_block_attentions_0_{layer.replace('.', '_')}"
    for added in ((), (1, 1)):
        tensors = {
            f"{name}.lora_down.weight": down.view(2, 64, *added),
            f"{name}.lora_up.weight": up.view(64, 2, *added),
        }
        save_file(tensors, tmp_path / "l.safetensors")
        before = family(tiny_diffusion).unet.mid_block.attentions[0].get_submodule(layer).weight
        one = with_lora(family(tiny_diffusion), tmp_path / "l.safetensors", 1.0)
        after = one.unet.mid_block.attentions[0].get_submodule(layer).weight
        assert after.shape == before.shape
        torch.testing.assert_close((after - before).flatten(1), up @ down, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "down", "up", "words"),
    [
        ("lora_unet_nowhere", (2, 8), (8, 2), "the unet of this model has no nowhere"),
        ("lora_unet_input_blocks_9_0_op", (2, 8), (8, 2), "the unet of this model has no input_blocks_9_0_op"),
        ("lora_unet_out_0", (2, 8), (8, 2), "the unet of this model has no out_0"),
        (TO_Q, (2, 8), (64, 2), "attn1_to_q is (64, 2) x (2, 8), and that layer (64, 64)"),
        (TO_Q, (2, 64), (64, 3), "is (64, 3) x (2, 64)"),
        (TO_Q, (0, 64), (64, 0), "is (64, 0) x (0, 64)"),
        (TO_Q, (2, 64), (64,), "is (64,) x (2, 64)"),
        (TO_K, (2, 64), (32, 2), "is (32, 2) x (2, 64), and that layer (64, 32)"),
        (CONV, (2, 32, 9), (64, 2), "is (64, 2) x (2, 32, 9), and that layer (64, 32, 3, 3)"),
    ],
)
def test_pairs_that_fit_no_layer_are_errors(family, tiny_diffusion, tmp_path, name, down, up, words):
    tensors = {f"{name}.lora_down.weight": torch.zeros(down), f"{name}.lora_up.weight": torch.zeros(up)}
    save_file(tensors, tmp_path / "l.safetensors")
    one = with_lora(family(tiny_diffusion), tmp_path / "l.safetensors", 1.0)
    with pytest.raises(UsageError, match=re.escape(words)):
        _ = one.unet


# ---- files that are refused


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"lora_unet_x.lora_mid.weight": 2}, "is LoRA with a Tucker core: it has lora_unet_x.lora_mid.weight"),
        ({"lora_unet_x.hada_w1_a": 2}, "is LoHa: it has lora_unet_x.hada_w1_a"),
        ({"lora_unet_x.lokr_w1": 2}, "is LoKr: it has lora_unet_x.lokr_w1"),
        ({"lora_unet_x.alpha": 1, "lora_unet_x.dora_scale": 2}, "is DoRA: it has lora_unet_x.dora_scale"),
        ({"unet.x.lora_magnitude_vector": 2}, "is DoRA: it has unet.x.lora_magnitude_vector"),
        ({"lora_unet_x.oft_blocks": 2}, "is OFT: it has lora_unet_x.oft_blocks"),
        ({"lora_unet_x.diff": 2}, "does not know what lora_unet_x.diff is"),
        ({"transformer.x.lora_A.weight": 2}, "no place for transformer.x.lora_A.weight"),
        ({"lora_te2_x.lora_down.weight": 2}, "is for a text_encoder_2, which this model has not"),
        ({"lora_unet_x.lora_down.weight": 2}, "x has one half only"),
        ({"lora_unet_x.alpha": 1}, "x has one half only"),
        ({"lora_unet_x.alpha": 2}, "lora_unet_x.alpha is (2, 2), and not one number"),
        ({"lora_unet_x_y.alpha": 1, "unet.x.y.alpha": 1}, "unet.x.y.alpha is in it a second time"),
        ({}, "holds no LoRA"),
    ],
)
def test_keys_that_fit_nothing_are_errors(tensors, words, tmp_path):
    tensors = {name: torch.zeros(size, size) for name, size in tensors.items()}
    save_file(tensors, tmp_path / "l.safetensors", {"ss_network_dim": "2", "format": "pt"})
    with pytest.raises(DbcapError, match=re.escape(words)) as caught:
        read(tmp_path / "l.safetensors", 1.0, {"unet": True, "text_encoder": True})
    damaged = any(said in words for said in ("one half only", "not one number", "a second time"))
    assert caught.type is (ModelError if damaged else UsageError)


def test_a_layer_by_both_of_its_names_is_an_error(family, tiny_diffusion, tmp_path):
    names = ("lora_unet_conv_in", "lora_unet_input_blocks_0_0")
    halves = {"lora_down": (2, 4, 3, 3), "lora_up": (32, 2, 1, 1)}
    tensors = {f"{name}.{half}.weight": torch.zeros(shape) for name in names for half, shape in halves.items()}
    save_file(tensors, tmp_path / "l.safetensors")
    one = with_lora(family(tiny_diffusion), tmp_path / "l.safetensors", 1.0)
    with pytest.raises(ModelError, match="conv_in and input_blocks_0_0 are one layer"):
        _ = one.unet


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("end", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_numbers_that_are_not_finite_are_errors(end, number, pairs, tmp_path):
    tensors, _ = kohya(pairs)
    bad = tensors[f"{TO_Q}.{end}"].clone()
    bad.view(-1)[-1] = number
    save_file(tensors | {f"{TO_Q}.{end}": bad.half()}, tmp_path / "l.safetensors")
    with pytest.raises(ModelError, match=re.escape(f"{TO_Q}.{end} has numbers that are not finite")):
        read(tmp_path / "l.safetensors", 1.0, {"unet": True, "text_encoder": True})


def test_a_weight_that_its_type_cannot_hold_is_an_error(family, tiny_diffusion, pairs, tmp_path):
    save_file(kohya(pairs)[0], tmp_path / "l.safetensors")
    assert with_lora(family(tiny_diffusion, "bfloat16"), tmp_path / "l.safetensors", 1e6).unet
    with pytest.raises(UsageError, match="becomes too large for float16"):
        _ = with_lora(family(tiny_diffusion, "float16"), tmp_path / "l.safetensors", 1e6).unet


@pytest.mark.parametrize(
    "said", ["{", "3", '{"unet.lora_alpha": null}', '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}}']
)
def test_a_config_that_makes_no_sense_is_one_line(said, pairs, tmp_path):
    save_file(peft(pairs)[0], tmp_path / "l.safetensors", {"lora_adapter_metadata": said})
    with pytest.raises(ModelError, match="its lora_adapter_metadata makes no sense"):
        read(tmp_path / "l.safetensors", 1.0, {"unet": True, "text_encoder": True})


def test_what_is_no_safetensors_file_is_one_line(tmp_path):
    (tmp_path / "l.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="cannot be read"):
        read(tmp_path / "l.safetensors", 1.0, {"unet": True})


def test_packed_layers_have_it_too(family, tiny_diffusion, tmp_path, monkeypatch):
    name = "lora_unet_mid_block_resnets_0_conv1.lora"
    halves = {f"{name}_down.weight": torch.ones(2, 64, 3, 3), f"{name}_up.weight": torch.ones(64, 2, 1, 1)}
    save_file(halves, tmp_path / "l")
    plain = with_lora(family(tiny_diffusion), tmp_path / "l", 0.1)
    _ = plain.unet
    monkeypatch.undo()
    packed, without = with_lora(family(tiny_diffusion), tmp_path / "l", 0.1), family(tiny_diffusion)
    condition, latents = plain.encode("a dog", 1, (32, 32)), torch.ones(1, 4, 8, 8)
    with torch.inference_mode():
        found, expected, other = (
            one.predict(latents, torch.tensor(9), [condition]) for one in (packed, plain, without)
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, other, rtol=1e-4, atol=1e-5)
