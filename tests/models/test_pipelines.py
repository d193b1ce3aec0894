"""Which files of a pipeline are read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from dbcap.errors import ModelError
from dbcap.models import pipelines
from dbcap.models.layout import refuse_pickle
from dbcap.models.pipelines import choose, choose_in, count_parameters, weight_files

UNET = "unet/diffusion_pytorch_model"
# The hub's runwayml/stable-diffusion-v1-5, as people copied it.
PUBLISHED = [
    *("README.md", "model_index.json", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "v1-inference.yaml"),
    *("feature_extractor/preprocessor_config.json", "scheduler/scheduler_config.json"),
    *(f"tokenizer/{name}" for name in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")),
    *(f"{part}/config.json" for part in ("safety_checker", "text_encoder", "unet", "vae")),
    *(
        f"{part}/{stem}{variant}.safetensors"
        for variant in ("", ".fp16")
        for part, stem in (
            ("safety_checker", "model"),
            ("text_encoder", "model"),
            ("unet", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
        )
    ),
    *(f"{UNET}{variant}" for variant in (".bin", ".fp16.bin", ".non_ema.safetensors", ".non_ema.bin")),
    *("text_encoder/pytorch_model.bin", "safety_checker/pytorch_model.bin"),
]


def test_of_the_published_model_one_set_of_weights_is_read():
    found = choose(PUBLISHED, "here")
    assert found.weights == {
        "unet": (f"{UNET}.safetensors",),
        "vae": ("vae/diffusion_pytorch_model.safetensors",),
        "text_encoder": ("text_encoder/model.safetensors",),
    }
    assert sorted(found.small) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "vae/config.json",
    ]
    assert found.names == found.small + tuple(files[0] for files in found.weights.values())
    assert (found.complete, found.pickled) == (True, ())


def test_the_safety_checker_is_read_where_it_is_asked_for():
    found = choose(PUBLISHED, "here", safety=True)
    assert found.weights["safety_checker"] == ("safety_checker/model.safetensors",)
    assert {"safety_checker/config.json", "feature_extractor/preprocessor_config.json"} < set(found.small)


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["fp16.safetensors", "bin"], "fp16.safetensors"),
        (["safetensors", "safetensors.index.json", "fp16.safetensors"], "safetensors"),
        (["safetensors.index.json", "fp16.safetensors", "bin"], "safetensors.index.json"),
        (["fp16.safetensors", "safetensors.index.fp16.json"], "fp16.safetensors"),
        (["safetensors.index.fp16.json", "safetensors.fp16.index.json", "bin"], "safetensors.index.fp16.json"),
        (["safetensors.fp16.index.json", "bin"], "safetensors.fp16.index.json"),
        (["bin"], "bin"),
        (["bin.index.json"], "bin.index.json"),
    ],
)
def test_the_first_that_is_there_is_taken(there, taken):
    others = [name for name in PUBLISHED if not name.startswith(UNET)]
    found = choose([*others, *(f"{UNET}.{ending}" for ending in there)], "here")
    assert found.weights["unet"][0] == f"{UNET}.{taken}"
    assert found.pickled == (((f"{UNET}.{taken}",),) if "bin" in taken else ())


def test_shards_come_with_their_index_and_no_others():
    shards = [f"{UNET}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    others = [name for name in PUBLISHED if not name.startswith(UNET)]
    strange = [f"{UNET}-00001-of-00002.bin", "unet/model-00001-of-00002.safetensors", f"x/{shards[0]}"]
    found = choose([*others, *shards[::-1], *strange, f"{UNET}.safetensors.index.json"], "here")
    assert found.weights["unet"] == (f"{UNET}.safetensors.index.json", *shards)


@pytest.mark.parametrize("index", ["safetensors.index.fp16.json", "safetensors.fp16.index.json"])
@pytest.mark.parametrize(
    "shard", [f"{UNET}.fp16-0000{{}}-of-00002.safetensors", f"{UNET}-0000{{}}-of-00002.fp16.safetensors"]
)
def test_shards_of_half_precision_under_newer_and_older_names(index, shard):
    others = [name for name in PUBLISHED if not name.startswith(UNET)]
    strange = [shard.format(3).replace("fp16", "ema"), f"{UNET}-00001-of-00002.safetensors", f"{UNET}.bin"]
    named = [shard.format(number) for number in (1, 2)]
    found = choose([*others, *strange, *named[::-1], f"{UNET}.{index}"], "here")
    assert found.weights["unet"] == (f"{UNET}.{index}", *named)


@pytest.mark.parametrize(
    "gone",
    [
        *("unet/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer/vocab.json"),
        "scheduler/scheduler_config.json",
    ],
)
def test_what_no_loader_can_do_without(gone):
    found = choose(set(PUBLISHED) - {gone}, "here")
    assert not found.complete
    assert gone in found.lacks.split(" or ")


def test_a_pipeline_with_two_encoders_needs_two_vocabularies():
    second = ["text_encoder_2/config.json", "text_encoder_2/model.safetensors"]
    assert not choose([*PUBLISHED, *second], "here").complete
    assert choose([*PUBLISHED, *second, "tokenizer_2/vocab.json"], "here").complete


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "here has no model_index.json"),
        (["config.json", "model.safetensors"], "here is a captioner, no diffusion pipeline"),
        (["model_index.json"], "here has no weights that dbcap reads for its unet"),
        ([*PUBLISHED, "text_encoder_2/config.json"], "here has no weights that dbcap reads for its text_encoder_2"),
    ],
)
def test_what_is_no_pipeline(names, message):
    with pytest.raises(ModelError, match=message):
        choose(names, "here")


def test_pickled_weights_are_refused_by_their_name():
    found = choose([name for name in PUBLISHED if name != "text_encoder/model.safetensors"], "here")
    refuse_pickle(choose(PUBLISHED, "here"), "here", allow_pickle=False)
    assert not found.pickled  # the half-precision file is there still
    left = [name for name in PUBLISHED if "text_encoder" not in name or "safetensors" not in name]
    refuse_pickle(choose(left, "here"), "here", allow_pickle=True)
    wanted = r"here has weights in a pickled file only \(text_encoder/pytorch_model\.bin\), which allow_pickle = false"
    with pytest.raises(ModelError, match=wanted):
        refuse_pickle(choose(left, "here"), "here", allow_pickle=False)


# ---- folders


@pytest.fixture
def sharded(tiny_diffusion, tmp_path):
    """A pipeline whose denoiser is in shards."""
    folder = shutil.copytree(tiny_diffusion, tmp_path / "sharded")
    (folder / f"{UNET}.safetensors").unlink()
    UNet2DConditionModel.from_pretrained(tiny_diffusion / "unet").save_pretrained(
        folder / "unet", max_shard_size="300KB"
    )
    return folder


def test_what_an_index_names_is_read_and_what_is_left_of_others_is_not(sharded):
    named = sorted(set(json.loads((sharded / f"{UNET}.safetensors.index.json").read_text())["weight_map"].values()))
    assert len(named) > 1
    shutil.copy(sharded / "unet" / named[0], sharded / f"{UNET}-00001-of-00099.safetensors")
    assert choose_in(sharded, "here").weights["unet"][1:] == tuple(f"unet/{name}" for name in named)
    assert [path.name for path in weight_files(sharded / "unet")] == named


def test_a_shard_that_is_missing_or_leads_elsewhere(sharded):
    index = sharded / f"{UNET}.safetensors.index.json"
    content = index.read_text()
    shard = sorted(json.loads(content)["weight_map"].values())[0]
    index.write_text(content.replace(shard, "../vae/diffusion_pytorch_model.safetensors"))
    with pytest.raises(ModelError, match="names a file that cannot be a shard"):
        choose_in(sharded, "here")
    index.write_text("{}")
    with pytest.raises(ModelError, match="it holds no weight_map"):
        weight_files(sharded / "unet")
    index.write_text(content)
    (sharded / "unet" / shard).unlink()
    with pytest.raises(ModelError, match=f"here has no unet/{shard}, which {UNET}.safetensors.index.json names"):
        choose_in(sharded, "here")


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("unet/config.json", "has no unet/config.json"),
        ("scheduler/scheduler_config.json", "has no scheduler/scheduler_config.json"),
        ("tokenizer/tokenizer.json", "has no tokenizer/tokenizer.json or tokenizer/vocab.json"),
    ],
)
def test_a_folder_that_is_not_whole_is_no_model_and_no_base(tiny_diffusion, tmp_path, gone, message):
    folder = shutil.copytree(tiny_diffusion, tmp_path / "model")
    parts = ("unet", "vae", "text_encoder")
    assert pipelines.describes(folder, parts)
    (folder / gone).unlink()
    with pytest.raises(ModelError, match=f"here {message}; fetch or copy the model again"):
        choose_in(folder, "here")
    assert not pipelines.describes(folder, parts)


def test_a_part_without_weights(tiny_diffusion, tmp_path):
    folder = shutil.copytree(tiny_diffusion / "vae", tmp_path / "vae")
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="has no weights in safetensors files"):
        weight_files(folder)


def test_weights_are_counted_without_reading_them(sharded, tiny_xl):
    parts = ("unet", "vae", "text_encoder")
    files = [file for part in parts for file in weight_files(sharded / part)]
    assert count_parameters(sharded) == sum(one.numel() for file in files for one in load_file(file).values())
    painter = StableDiffusionXLPipeline.from_pretrained(tiny_xl, dtype=torch.float32)
    modules = (painter.unet, painter.vae, painter.text_encoder, painter.text_encoder_2)
    assert count_parameters(tiny_xl) == sum(one.numel() for module in modules for one in module.parameters())


def test_the_class_of_a_pipeline(tiny_diffusion, tiny_xl, tmp_path):
    assert pipelines.class_name(tiny_diffusion) == "StableDiffusionPipeline"
    assert pipelines.class_name(tiny_xl) == "StableDiffusionXLPipeline"
    (tmp_path / "model_index.json").write_text("{}")
    assert pipelines.class_name(tmp_path) == ""
    for damage in (b"{", b"[1]", b"\xff"):
        (tmp_path / "model_index.json").write_bytes(damage)
        with pytest.raises(ModelError, match=r"model_index\.json is damaged"):
            pipelines.class_name(tmp_path)
