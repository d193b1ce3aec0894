"""What is taken from configs is checked, and a file that cannot be used is named."""

import json
import re
import shutil

import pytest

from dbcap.errors import ModelError
from dbcap.generation import schedulers
from dbcap.models.families import describe
from dbcap.models.hub import LocalModel
from dbcap.models.specs import parse

UNET, VAE, TEXT = (f"{part}/config.json" for part in ("unet", "vae", "text_encoder"))
SCHEDULER, TOKENIZER = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
ABSENT = object()


@pytest.fixture
def damaged(tiny_diffusion, tmp_path):
    """Return a function that gives a pipeline with other values in one of its files, or with another content."""

    def call(name, values=None, content=""):
        folder = shutil.copytree(tiny_diffusion, tmp_path / "model")
        path = folder / name
        changed = json.loads(path.read_text()) | (values or {})
        kept = {key: value for key, value in changed.items() if value is not ABSENT}
        path.write_text(content or json.dumps(kept))
        return folder

    return call


def asked(model):
    """Return all that a plan asks of a description."""
    return model.size, model.latent_channels, model.inpaints, model.vae_config, model.scheduler_config


@pytest.mark.parametrize(
    ("name", "values", "wrong"),
    [
        (UNET, {"sample_size": "x"}, 'sample_size = "x" is no whole number above 0'),
        (UNET, {"sample_size": None}, "sample_size = null is no whole number above 0"),
        (UNET, {"in_channels": True}, "in_channels = true is no whole number above 0"),
        (UNET, {"block_out_channels": 5}, "block_out_channels = 5 is no list of whole numbers above 0"),
        (VAE, {"block_out_channels": ABSENT}, "it has no block_out_channels"),
        (VAE, {"block_out_channels": "x"}, 'block_out_channels = "x" is no list of whole numbers above 0'),
        (VAE, {"block_out_channels": []}, "block_out_channels = [] is no list of whole numbers above 0"),
        (VAE, {"latent_channels": -4}, "latent_channels = -4 is no whole number above 0"),
        (VAE, {"scaling_factor": "x"}, 'scaling_factor = "x" is no number above 0'),
        (VAE, {"scaling_factor": 0}, "scaling_factor = 0 is no number above 0"),
        (VAE, {"shift_factor": float("nan")}, "shift_factor = NaN is no number"),
        (SCHEDULER, {"_class_name": ABSENT}, "it has no _class_name"),
        (SCHEDULER, {"beta_start": "x"}, 'beta_start = "x" is no number'),
        (SCHEDULER, {"num_train_timesteps": 0}, "num_train_timesteps = 0 is no whole number above 0"),
        (SCHEDULER, {"prediction_type": "x"}, 'prediction_type = "x" is none of epsilon, sample, v_prediction'),
        (SCHEDULER, {"timestep_spacing": []}, "timestep_spacing = [] is none of linspace, leading, trailing"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(damaged, name, values, wrong):
    folder = damaged(name, values)
    with pytest.raises(ModelError, match=re.escape(f"{folder / name} is damaged: {wrong}; fetch or copy")):
        asked(describe(LocalModel(parse(str(folder)), folder, "", ())))


@pytest.mark.parametrize("name", [UNET, VAE, SCHEDULER])
@pytest.mark.parametrize(("content", "wrong"), [("[]", "it is no JSON object"), ("{", ""), ("[" * 100_000, "")])
def test_a_config_that_is_none(damaged, name, content, wrong):
    folder = damaged(name, content=content)
    with pytest.raises(ModelError, match=re.escape(f"{folder / name} is damaged: {wrong}")):
        asked(describe(LocalModel(parse(str(folder)), folder, "", ())))


@pytest.mark.parametrize(
    ("name", "values", "wrong"),
    [
        (TEXT, {"max_position_embeddings": "x"}, 'max_position_embeddings = "x" is no whole number above 0'),
        (TOKENIZER, {"model_max_length": ABSENT}, "it needs a model_max_length from 3 to 16, which the text_encoder"),
        (TOKENIZER, {"model_max_length": "x"}, "it needs a model_max_length from 3 to 16"),
        (TOKENIZER, {"model_max_length": 17}, "it needs a model_max_length from 3 to 16"),
        (TOKENIZER, {"pad_token": None}, "it needs a bos_token, an eos_token and a pad_token"),
    ],
)
def test_a_tokenizer_that_does_not_fit_its_encoder(damaged, family, name, values, wrong):
    folder = damaged(name, values)
    with pytest.raises(ModelError, match=re.escape(f"{folder / name} is damaged: {wrong}")):
        family(folder).tokens("a dog")


@pytest.mark.parametrize("name", [schedulers.OWN, "euler"])
@pytest.mark.parametrize("values", [{"trained_betas": "x"}, {"beta_schedule": "x"}])
def test_a_scheduler_that_cannot_be_made_is_one_line(damaged, family, name, values):
    config = family(damaged(SCHEDULER, values)).scheduler_config
    with pytest.raises(ModelError, match=r"^what the model's scheduler_config\.json describes cannot be loaded: .+$"):
        schedulers.make(name, config)


def test_a_class_that_does_not_fit_what_is_there(tiny_diffusion, tiny_xl, tmp_path):
    for source, other, has in ((tiny_diffusion, "XLPipeline", "no"), (tiny_xl, "Pipeline", "a")):
        folder = shutil.copytree(source, tmp_path / other)
        path = folder / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": f"StableDiffusion{other}"}))
        wanted = f"{path} names a StableDiffusion{other}, and {folder} has {has} text_encoder_2"
        with pytest.raises(ModelError, match=re.escape(wanted)):
            describe(LocalModel(parse(str(folder)), folder, "", ()))
