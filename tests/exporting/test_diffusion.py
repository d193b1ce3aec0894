"""Exported pipelines: each graph gives what torch gives, all together make its pictures, and others can read them."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file

from dbcap.errors import ModelError
from dbcap.events import Silent
from dbcap.exporting import diffusion, diffusion_graphs, weights_only
from dbcap.exporting.pipelines import opened
from dbcap.files import sha256_of
from dbcap.generation import sampling, schedulers
from dbcap.models import families
from dbcap.models.families.onnx import Graph
from dbcap.models.hub import locate
from dbcap.models.trained import Addition

TINY = 3e-5
"""Most that numbers of about 1 may differ by."""
GRAPHS = {"text_encoder": 1, "text_encoder_2": 1, "unet": 3, "vae_encoder": 1, "vae_decoder": 1}


def located(text, home):
    return locate(str(text), kind="diffusion", offline=True, events=Silent(), home=home)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def taught(tiny_diffusion, cache):
    """The tiny model with a LoRA and a new word."""
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    drawn = torch.Generator().manual_seed(1)
    halves = {f"unet.{layer}.lora_A.weight": (4, 64), f"unet.{layer}.lora_B.weight": (64, 4)}
    save_file({name: torch.randn(shape, generator=drawn) for name, shape in halves.items()}, cache / "lora.safetensors")
    save_file({"<rex>": torch.randn(2, 32, generator=drawn)}, cache / "rex.safetensors")
    files = [(cache / "lora.safetensors", False), (cache / "rex.safetensors", True)]
    added = tuple(Addition(path, 0.8, sha256_of(path), embedding=word, own=True) for path, word in files)
    return replace(located(tiny_diffusion, cache), additions=added)


@pytest.fixture(scope="module")
def in_float32(taught, tiny_xl, cache, tmp_path_factory):
    """Return a function that gives a model, "sd" with what was added or "xl", and the folder it is exported to."""

    @functools.cache
    def call(name):
        local = taught if name == "sd" else located(tiny_xl, cache)
        folder = tmp_path_factory.mktemp("exported")
        diffusion.write(local, folder, "fp32")
        return local, folder

    return call


@pytest.fixture(params=["sd", pytest.param("xl", marks=pytest.mark.slow)])
def pair(request, in_float32, cache):
    """A pipeline on torch and exported."""
    local, folder = in_float32(request.param)
    return opened(local), opened(located(folder, cache))


@pytest.fixture
def traced(in_float32, monkeypatch):
    """Take the graphs that are there already instead of tracing anew."""
    _, folder = in_float32("sd")
    for part in ("text_encoder", "unet", "vae_encoder", "vae_decoder"):
        monkeypatch.setattr(diffusion_graphs, part, lambda *_, part=part: ir.load(folder / part / "model.onnx"))


def latents(family, prompts, size, steps=4):
    width, height = size
    told = [family.encode(prompt, 1, size) for prompt in prompts]
    return sampling.denoise(
        family,
        schedulers.make(schedulers.OWN, family.scheduler_config),
        told,
        [family.encode("", 1, size)] * len(prompts),
        [sampling.generator(seed) for seed in range(len(prompts))],
        (family.latent_channels, height // family.factor, width // family.factor),
        sampling.Settings(steps, 3.0),
        device=family.device,
    )


def pictures(family, prompts, size):
    return np.stack([family.decode(one).numpy() for one in latents(family, prompts, size)]).astype(int)


def run(family, part, inputs, outputs, **given):
    return Graph(family.folder / part / "model.onnx", inputs, outputs).run(**given)


# ---- float32


def test_text_encoders_give_what_torch_gives(pair):
    torchs, exported = pair
    for (_, part, _), rows in zip(torchs.text_parts, torchs.token_rows("a red dog on a table", 2), strict=True):
        found = run(exported, part, ["input_ids"], [], input_ids=rows)
        expected = torchs.plain(part)(rows, output_hidden_states=True)
        for name, tensor in found.items():
            before, dot, number = name.partition(".")
            wanted = expected[before][int(number)] if dot else expected[name]
            assert torch.allclose(tensor, wanted, atol=TINY), f"{part} {name}"
        assert len(found) == (2 + len(expected.hidden_states) if len(torchs.text_parts) > 1 else 2)


@pytest.mark.parametrize("size", [(8, 8), (13, 7), (1, 2)])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_denoiser_gives_what_torch_gives_for_any_size_and_length(pair, size, rows):
    torchs, exported = pair
    drawn = torch.Generator().manual_seed(0)
    xl = len(torchs.text_parts) > 1
    given = {
        "sample": torch.randn(rows, 4, *size, generator=drawn),
        "timestep": torch.tensor(731.25),
        "encoder_hidden_states": torch.randn(rows, 11, 64 if xl else 32, generator=drawn),
    }
    more = {"text_embeds": torch.randn(rows, 32, generator=drawn), "time_ids": torch.full((rows, 6), 32.0)}
    more = more if xl else {}
    found = run(exported, "unet", [*given, *more], ["out_sample"], **given, **more)["out_sample"]
    expected = torchs.plain("unet")(*given.values(), added_cond_kwargs=more or None).sample
    assert torch.allclose(found, expected, atol=TINY)


@pytest.mark.parametrize("size", [(32, 32), (20, 44)])
def test_the_autoencoder_gives_what_torch_gives(pair, size):
    torchs, exported = pair
    drawn, vae = torch.Generator().manual_seed(0), torchs.plain("vae")
    picture = torch.rand(2, 3, *size, generator=drawn) * 2 - 1
    expected = vae.encode(picture).latent_dist.parameters
    found = run(exported, "vae_encoder", ["sample"], [], sample=picture)["latent_parameters"]
    assert torch.allclose(found, expected, atol=TINY)
    small = torch.randn(2, 4, size[0] // 4, size[1] // 4, generator=drawn)
    found = run(exported, "vae_decoder", ["latent_sample"], [], latent_sample=small)["sample"]
    assert torch.allclose(found, vae.decode(small).sample, atol=TINY)


@pytest.mark.parametrize("size", [(32, 32), (52, 28)])
def test_pictures_are_those_of_torch(pair, size):
    torchs, exported = pair
    prompts = ["a red dog", "a cat"]
    assert np.abs(pictures(torchs, prompts, size) - pictures(exported, prompts, size)).max() <= 1


def test_what_was_added_is_part_of_it(in_float32, tiny_diffusion, cache):
    local, folder = in_float32("sd")
    exported, plain = opened(located(folder, cache)), families.load(located(tiny_diffusion, cache), "cpu", "float32")
    prompt = ["a <rex> dog"]
    expected = pictures(opened(local), prompt, (32, 32))
    assert np.abs(expected - pictures(exported, prompt, (32, 32))).max() <= 1
    assert np.abs(expected - pictures(plain, prompt, (32, 32))).max() > 1
    assert len(exported.tokens("<rex>")) == 2
    assert exported.config("text_encoder")["vocab_size"] == len(exported.tokenizers[0])


def test_a_picture_does_not_depend_on_the_others_of_its_batch(pair):
    _, exported = pair
    alone = latents(exported, ["a red dog"], (32, 32))
    three = latents(exported, ["a red dog", "a cat", "a table"], (32, 32))
    assert torch.allclose(alone[0], three[0], atol=1e-4)


def test_the_files_are_those_that_optimum_reads(pair):
    torchs, exported = pair
    folder, xl = exported.folder, len(torchs.text_parts) > 1
    parts = [part for part in GRAPHS if xl or part != "text_encoder_2"]
    for part in parts:
        path = folder / part / "model.onnx"
        graph = onnx.load(path)
        onnx.checker.check_model(graph, full_check=True)
        assert (folder / part / "config.json").is_file()
        assert b".py" not in path.read_bytes(), "no paths of whoever exported it"
        names = [value.name for value in graph.graph.input]
        assert len(names) == GRAPHS[part] + (2 if part == "unet" and xl else 0)
        kinds = {value.type.tensor_type.elem_type for value in (*graph.graph.input, *graph.graph.output)}
        assert kinds <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    assert sorted(path.parent.name for path in folder.glob("*/*.onnx")) == sorted(parts)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    assert index.get("safety_checker", [None, None]) == [None, None]
    time = next(value for value in onnx.load(folder / "unet/model.onnx").graph.input if value.name == "timestep")
    assert not time.type.tensor_type.shape.dim


# ---- other numbers


def test_int8_is_a_quarter_and_close(traced, in_float32, cache, tmp_path):
    local, folder = in_float32("sd")
    written = diffusion.write(local, tmp_path, "int8")
    assert [one.name for one in written] == [
        "text_encoder/model.onnx",
        "unet/model.onnx",
        "vae_encoder/model.onnx",
        "vae_decoder/model.onnx",
    ]
    for one in written:
        assert one.share.of_all > 0.95
        kinds = {weight.dtype for weight in ir.load(tmp_path / one.name).graph.initializers.values()}
        assert ir.DataType.INT8 in kinds
    sizes = [
        sum(weight.const_value.nbytes for weight in ir.load(where / "unet/model.onnx").graph.initializers.values())
        for where in (folder, tmp_path)
    ]
    assert sizes[1] < 0.27 * sizes[0]
    prompts = ["a red dog", "a cat"]
    exported = opened(located(tmp_path, cache))
    difference = np.abs(pictures(opened(local), prompts, (32, 32)) - pictures(exported, prompts, (32, 32)))
    assert (difference.max(), difference.mean()) <= (8, 1)
    assert torch.allclose(
        latents(exported, prompts, (32, 32))[0], latents(exported, prompts[:1], (32, 32))[0], atol=1e-3
    )


def test_what_cannot_be_quantised_is_an_error(traced, in_float32, tmp_path, monkeypatch):
    monkeypatch.setattr(weights_only, "_OUTPUTS", {"MatMul": 1})
    with pytest.raises(ModelError, match=r"only \d+% of the weights of unet/model.onnx could be quantised"):
        diffusion.write(in_float32("sd")[0], tmp_path, "int8")


def test_a_weight_too_large_for_float16_is_an_error(taught, tmp_path, monkeypatch):
    monkeypatch.setattr("dbcap.models.tensors.torch.isfinite", lambda _: torch.tensor(False))
    with pytest.raises(ModelError, match=r"of the text_encoder of .* has numbers too large for float16"):
        diffusion.write(taught, tmp_path, "fp16")


def test_what_is_exported_is_not_exported_again(in_float32, cache, tmp_path):
    with pytest.raises(ModelError, match="has ONNX files only"):
        diffusion.write(located(in_float32("sd")[1], cache), tmp_path, "fp32")


@pytest.mark.slow
def test_float16_is_close(tiny_xl, cache, tmp_path):
    local = located(tiny_xl, cache)
    diffusion.write(local, tmp_path, "fp16")
    kinds = {part: ir.load(tmp_path / part / "model.onnx") for part in ("unet", "vae_decoder")}
    assert kinds["unet"].graph.initializers["model.conv_in.weight"].dtype == ir.DataType.FLOAT16
    assert kinds["vae_decoder"].graph.initializers["model.post_quant_conv.weight"].dtype == ir.DataType.FLOAT
    prompts, exported = ["a red dog", "a cat"], opened(located(tmp_path, cache))
    assert np.abs(pictures(opened(local), prompts, (32, 32)) - pictures(exported, prompts, (32, 32))).max() <= 2


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "most"), [("fp32", 1), ("fp16", 8), ("int8", 80)])
def test_the_starter_model(cache, tmp_path, precision, most):
    local = located("starter", cache)
    diffusion.write(local, tmp_path, precision)
    prompts, exported = ["a red circle on a table"], opened(located(tmp_path, cache))
    difference = np.abs(pictures(opened(local), prompts, (64, 64)) - pictures(exported, prompts, (64, 64)))
    assert difference.max() <= most
    assert difference.mean() < 4
    assert (tmp_path / "tokenizer" / "merges.txt").is_file()
