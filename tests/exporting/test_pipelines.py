"""Diffusion models as one file and as diffusers' folder: the same weights and pictures, with what a run trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dbcap.config.models import CommonConfig, ExportConfig
from dbcap.errors import ModelError, UsageError
from dbcap.events import Silent
from dbcap.exporting.pipelines import opened
from dbcap.exporting.run import run
from dbcap.models.hub import locate
from dbcap.models.identity import Identity, of_folder
from dbcap.models.single_file import FILES

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
PARTS = ("unet", "vae", "text_encoder")


def located(text):
    return locate(text, kind="diffusion", offline=True, events=Silent(), home=Path("cache").absolute())


@pytest.fixture
def make(home, tmp_path, monkeypatch):
    """Return a function that exports a diffusion model to a place of this name, and returns that."""
    monkeypatch.chdir(tmp_path)

    def call(model, out="e", **options):
        settings = {"models": (str(model),), "out": str(tmp_path / out), **options}
        return run(ExportConfig(**settings), CommonConfig(), Silent(), "").output

    return call


@pytest.fixture
def of_run(write_run, tiny_diffusion, tmp_path, monkeypatch):
    """Return a function that writes a run of a method on the tiny model."""
    monkeypatch.chdir(tmp_path)
    drawn = torch.Generator().manual_seed(1)

    def call(method):
        run = write_run(model=str(tiny_diffusion), revision=located(str(tiny_diffusion)).revision, method=method)
        if method == "full":
            pipeline = StableDiffusionPipeline.from_pretrained(tiny_diffusion)
            for tensor in pipeline.unet.parameters():
                tensor.data += 0.05 * torch.randn(tensor.shape, generator=drawn)
            pipeline.save_pretrained(run.final)
            (run.final / "dbcap.json").write_text('{"identifier": "sks", "class": "dog"}')
        elif method == "lora":
            run.final.mkdir(parents=True)
            halves = {f"unet.{LAYER}.lora_A.weight": (4, 64), f"unet.{LAYER}.lora_B.weight": (64, 4)}
            state = {name: torch.randn(shape, generator=drawn) for name, shape in halves.items()}
            save_file(state, run.final / "lora.safetensors")
        else:
            run.final.mkdir(parents=True)
            save_file({"<dog-1>": torch.randn(1, 32, generator=drawn)}, run.final / "dog-1.safetensors")
        return run

    return call


def weights(text):
    family = opened(located(str(text)))
    return {f"{part}.{name}": tensor for part in PARTS for name, tensor in family.plain(part).state_dict().items()}


def equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    return True


def picture(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 32, "width": 32, "output_type": "np"}
    return pipeline("a sks dog", generator=torch.Generator().manual_seed(0), **settings).images


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_as_one_file_is_what_the_run_is(method, make, of_run):
    run = of_run(method)
    path = make("run:dog-1", "one.safetensors", single_file=True)
    assert path.name == "one.safetensors"
    assert equal(weights("run:dog-1"), weights(path))
    with safe_open(path, "pt") as file:
        said = file.metadata()
    assert json.loads(said["dbcap.export"])["model"]["name"] == "run:dog-1"
    assert json.loads(json.loads(said[FILES])["dbcap.json"]) == {"identifier": "sks", "class": "dog"}
    if method == "full":
        ours = StableDiffusionPipeline.from_single_file(str(path), config=str(run.final))
        assert np.array_equal(picture(ours), picture(StableDiffusionPipeline.from_pretrained(run.final)))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_as_a_folder_of_diffusers(method, make, of_run):
    of_run(method)
    folder = make("run:dog-1", diffusers=True)
    assert equal(weights("run:dog-1"), weights(folder))
    assert of_folder(folder) == Identity("sks", "dog")
    written = {file["name"] for file in json.loads((folder / "export.json").read_text())["files"]}
    assert written == {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")}
    loaded = StableDiffusionPipeline.from_pretrained(folder)
    assert torch.equal(loaded.unet.state_dict()[f"{LAYER}.weight"], weights("run:dog-1")[f"unet.{LAYER}.weight"])


def test_a_new_word_is_part_of_the_folder(make, of_run):
    of_run("embedding")
    folder = make("run:dog-1", diffusers=True)
    told = [opened(located(text)).encode("a <dog-1> dog", 1, (32, 32)).states for text in ("run:dog-1", str(folder))]
    assert torch.equal(*told)
    loaded = StableDiffusionPipeline.from_pretrained(folder)
    assert len(loaded.tokenizer("<dog-1>", add_special_tokens=False).input_ids) == 1
    assert loaded.text_encoder.get_input_embeddings().num_embeddings == len(loaded.tokenizer)


def test_a_single_file_has_no_place_for_a_new_word(make, of_run):
    of_run("embedding")
    with pytest.raises(UsageError, match=r"a single file has no place for the word of .*dog-1\.safetensors"):
        make("run:dog-1", "one.safetensors", single_file=True)
    assert not Path("one.safetensors").exists()


def test_a_folder_that_a_word_was_added_to_is_no_single_file_either(make, of_run):
    of_run("embedding")
    folder = make("run:dog-1", diffusers=True)
    with pytest.raises(UsageError, match=r"a single file has no place for the word <dog-1> of .*/e; --diffusers has"):
        make(folder, "one.safetensors", single_file=True)
    assert not Path("one.safetensors").exists()


def test_a_lora_is_not_rounded_to_the_numbers_of_its_model(make, write_run, tiny_diffusion):
    half = make(tiny_diffusion, "half.safetensors", single_file=True, fp16=True)
    run = write_run(model=str(half), revision=located(str(half)).revision, method="lora")
    run.final.mkdir(parents=True)
    halves = {f"unet.{LAYER}.lora_A.weight": torch.ones(1, 64), f"unet.{LAYER}.lora_B.weight": 1e-5 * torch.ones(64, 1)}
    save_file(halves, run.final / "lora.safetensors")
    expected = weights(half)[f"unet.{LAYER}.weight"].float() + 1e-5
    for out, options in (("one.safetensors", {"single_file": True}), ("folder", {"diffusers": True})):
        found = weights(make("run:dog-1", out, **options))
        assert torch.equal(found[f"unet.{LAYER}.weight"], expected)
        assert found["vae.quant_conv.weight"].dtype == torch.float16


def test_a_file_without_configs_takes_those_of_a_folder(make, tiny_diffusion):
    path = make(tiny_diffusion, "one.safetensors", single_file=True)
    save_file(load_file(path), "bare.safetensors")
    with pytest.raises(ModelError, match="give --base FOLDER"):
        make("bare.safetensors", "e", diffusers=True)
    assert equal(
        weights(tiny_diffusion), weights(make("bare.safetensors", "e", diffusers=True, base=str(tiny_diffusion)))
    )
    with pytest.raises(UsageError, match=r"--base goes with a model that is a \.safetensors file"):
        make(tiny_diffusion, "f", diffusers=True, base=str(tiny_diffusion))


@pytest.mark.parametrize("method", ["full", "embedding"])
def test_a_run_without_lora_has_none_to_export(method, make, of_run):
    of_run(method)
    with pytest.raises(UsageError, match="has no LoRA: it was trained by another --method"):
        make("run:dog-1", "one.safetensors", lora="kohya")


def test_the_lora_of_a_run_and_back(make, of_run):
    run = of_run("lora")
    kohya = make("run:dog-1", "loras", lora="kohya")
    assert kohya.name == "dog-1.safetensors"
    assert {name.partition(".")[2] for name in load_file(kohya)} == {"alpha", "lora_down.weight", "lora_up.weight"}
    assert equal(load_file(run.final / "lora.safetensors"), load_file(make(kohya, "b.safetensors", lora="diffusers")))


def test_a_folder_as_one_file_in_float16(tiny_diffusion, make):
    path = make(tiny_diffusion, "one.safetensors", single_file=True, fp16=True)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    expected = {name: tensor.half().float() for name, tensor in weights(tiny_diffusion).items()}
    assert equal(expected, {name: tensor.float() for name, tensor in weights(path).items()})
    assert equal(weights(path), weights(make(path, "again.safetensors", single_file=True)))
    assert equal(weights(path), weights(make(path, "folder", diffusers=True)))


def test_a_weight_too_large_for_float16_is_named(tiny_diffusion, make, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_diffusion)
    pipeline.unet.conv_in.weight.data[0, 0, 0, 0] = 1e6
    pipeline.save_pretrained(tmp_path / "large")
    with pytest.raises(ModelError, match=r"input_blocks\.0\.0\.weight of .* has numbers too large for float16"):
        make(tmp_path / "large", "one.safetensors", single_file=True, fp16=True)
    assert not (tmp_path / "one.safetensors").exists()


def test_xl(tiny_xl, make):
    path = make(tiny_xl, "one.safetensors", single_file=True)
    assert equal(weights(tiny_xl), weights(path))
    assert equal(weights(path), weights(make(path, "folder", diffusers=True)))
