"""A model loaded by dbcap against transformers' `from_pretrained` of the same folder."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BlipForConditionalGeneration, GitForCausalLM, VisionEncoderDecoderModel

from dbcap.captioning.loading import load_weights

CLASSES = {
    "tiny_captioner": VisionEncoderDecoderModel,
    "blip_captioner": BlipForConditionalGeneration,
    "git_captioner": GitForCausalLM,
}


def in_shards(folder):
    """Split a model's weights into two files and an index, as large models have them."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    where = {name: f"model-0000{1 + (number % 2)}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: weights[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def settings(model):
    """Return the generation settings, without the note of where they came from."""
    settings = model.generation_config.to_dict()
    return {name: value for name, value in settings.items() if name != "_from_model_config"}


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", CLASSES)
def test_the_model_is_that_of_from_pretrained(model, dtype, shards, request, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(model), folder)
    if shards:
        in_shards(folder)
    theirs = CLASSES[model].from_pretrained(folder, dtype=dtype)
    ours = load_weights(CLASSES[model], folder, "it", dtype).model
    assert not ours.training
    assert ours.config.to_dict() | {"_name_or_path": ""} == theirs.config.to_dict() | {"_name_or_path": ""}
    assert settings(ours) == settings(theirs)
    left, right = ({**dict(one.named_buffers()), **one.state_dict()} for one in (ours, theirs))
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert torch.equal(value, right[name]), name


def test_settings_in_config_json_count_where_there_is_no_generation_config(tiny_captioner, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_captioner, folder)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_beams": 3, "max_length": 7}))
    theirs = VisionEncoderDecoderModel.from_pretrained(folder)
    ours = load_weights(VisionEncoderDecoderModel, folder, "it", torch.float32).model
    assert (ours.generation_config.num_beams, ours.generation_config.max_length) == (3, 7)
    assert settings(ours) == settings(theirs)
