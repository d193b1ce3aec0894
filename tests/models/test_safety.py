"""The safety checker decides as in diffusers' pipeline, and its files are read only where it is asked for."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from dbcap.config import paths
from dbcap.errors import ModelError
from dbcap.models.hub import locate

PAINTER = "org/painter"
WEIGHTS, PROCESSOR = "safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json"
OF_CHECKER = [PROCESSOR, "safety_checker/config.json", WEIGHTS]


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def copied(checked, tmp_path):
    """A pipeline whose checker flags nothing, to be changed."""
    return shutil.copytree(checked(2), tmp_path / "model")


# ---- what it flags


@pytest.fixture(scope="session")
def latents():
    """Those of eight pictures, light and dark ones, of two sizes."""
    random = torch.Generator().manual_seed(0)
    light = torch.linspace(-9, 9, 8)
    return [torch.randn(4, 8, 8 + number % 2 * 4, generator=random) + light[number] for number in range(8)]


def theirs(folder, latents):
    """Return what diffusers' pipeline flags of pictures, each of which stands in a batch with two others."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    flagged = []
    for one in latents:
        batch = torch.stack([one, -one, one.flip(-1)]) / pipeline.vae.config.scaling_factor
        with torch.no_grad():
            pictures = pipeline.vae.decode(batch).sample
        flagged.append(pipeline.run_safety_checker(pictures, "cpu", torch.float32)[1][0])
    return flagged


def test_it_flags_what_diffusers_flags(checked, dividing, family, latents):
    pictures = [family(checked(2)).decode(one).numpy() for one in latents]
    for threshold in (-2, 2, dividing(pictures)):
        wanted = theirs(checked(threshold), latents)
        assert (all(wanted), any(wanted)) == (threshold == -2, threshold != 2)
        for dtype in ("float32", "bfloat16"):
            checker = family(checked(threshold), dtype).safety
            assert [checker.flags(one) for one in pictures] == wanted


def test_files_of_its_time_are_read_as_those_of_today(copied, checked, family, latents):
    weights = load_file(copied / WEIGHTS)
    old = {name.replace("vision_model.", "vision_model.vision_model."): one for name, one in weights.items()}
    positions = torch.arange(len(weights["vision_model.embeddings.position_embedding.weight"]))
    save_file({**old, "vision_model.vision_model.embeddings.position_ids": positions[None]}, copied / WEIGHTS)
    vision = json.loads((copied / "safety_checker/config.json").read_text())["vision_config"]
    changes = {"torch_dtype": "float16", "transformers_version": None, "vision_config_dict": vision}
    edit(copied / "safety_checker/config.json", **changes)
    called = dict.fromkeys(("feature_extractor_type", "image_processor_type"), "CLIPFeatureExtractor")
    edit(copied / PROCESSOR, size=16, crop_size=16, **called)
    found = family(copied).safety
    found.load()
    state = found._checker.state_dict()
    assert all(torch.equal(state[name], one) for name, one in weights.items())
    picture = family(checked(2)).decode(latents[0]).numpy()
    assert not found.flags(picture)
    edit(copied / "model_index.json", feature_extractor=["transformers", "CLIPFeatureExtractor"])
    assert family(copied).safety is not None


def test_nothing_is_said(checked, family, latents, capfd):
    ours = family(checked(-2))
    capfd.readouterr()  # writing a model shows a bar
    assert ours.safety.flags(ours.decode(latents[0]).numpy())
    assert capfd.readouterr() == ("", "")


def test_models_that_have_none(tiny_diffusion, tiny_xl, copied, family):
    edit(copied / "model_index.json", safety_checker=["elsewhere", "OtherChecker"])
    for folder in (tiny_diffusion, tiny_xl, copied):
        assert family(folder).safety is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("concept_embeds_weights", "the safety_checker of {} lacks the weight concept_embeds_weights, or has it in"),
        ("visual_projection.weight", "the safety_checker of {} lacks the weight visual_projection.weight, or has it"),
        ("", "{} cannot be loaded: "),
    ],
)
def test_a_checker_that_is_not_whole(name, said, copied, family):
    weights = load_file(copied / WEIGHTS)
    if name:
        save_file({one: tensor for one, tensor in weights.items() if one != name}, copied / WEIGHTS)
    else:
        (copied / PROCESSOR).write_text("{")
    with pytest.raises(ModelError) as failure:
        family(copied).safety.load()
    assert str(failure.value).startswith(said.format(copied))
    assert "\n" not in str(failure.value)


# ---- where its files are


def place(text, heard, safety=True, offline=False):
    given = {"kind": "diffusion", "safety": safety, "offline": offline}
    return locate(str(text), **given, events=heard, home=paths.cache_dir())


def refusal(*arguments, **named):
    with pytest.raises(ModelError) as failure:
        place(*arguments, **named)
    assert "\n" not in str(failure.value)
    return str(failure.value)


@pytest.fixture
def served(hub, checked):
    started = hub()
    shutil.copytree(checked(2), started.repo(PAINTER), dirs_exist_ok=True)
    return started


def fetched(hub):
    """Return which files were sent since this was asked last."""
    names = [one.path.split("/", 5)[5] for one in hub.requests if one.method == "GET" and "/resolve/" in one.path]
    hub.requests.clear()
    return names


def test_it_is_fetched_where_it_is_asked_for_and_what_is_there_is_not_again(served, heard):
    plain = place(PAINTER, heard, safety=False)
    assert not set(OF_CHECKER) & set(fetched(served))
    line = refusal(PAINTER, heard, offline=True)
    assert f"the safety checker of {PAINTER} is not in the cache, and --offline (or HF_HUB_OFFLINE) forbids" in line
    assert "without --safety it is not needed" in line
    model = place(PAINTER, heard)
    assert sorted(fetched(served)) == OF_CHECKER
    assert {file.name for file in model.files} - {file.name for file in plain.files} == set(OF_CHECKER)
    assert (model.revision, model.folder) == (plain.revision, plain.folder)
    served.stop()
    assert place(PAINTER, heard, offline=True) == place(PAINTER, heard) == model
    assert place(PAINTER, heard, safety=False, offline=True) == plain


def test_a_hub_that_is_gone_before_it_is_here(served, heard):
    place(PAINTER, heard, safety=False)
    served.stop()
    line = refusal(PAINTER, heard)
    assert f", and the safety checker of {PAINTER} is not in the cache;" in line
    assert "cannot reach the hub" in line


def test_all_of_it_at_once(served, heard):
    model = place(PAINTER, heard)
    assert set(OF_CHECKER) < set(fetched(served))
    assert all((model.folder / name).is_file() for name in OF_CHECKER)
    for name in OF_CHECKER:
        (model.folder / name).unlink()
        assert f"the safety checker of {PAINTER} is not in the cache" in refusal(PAINTER, heard, offline=True)
        assert place(PAINTER, heard) == model


def test_a_model_without_one_is_whole_without(hub, heard, tiny_xl):
    started = hub()
    shutil.copytree(tiny_xl, started.repo(PAINTER), dirs_exist_ok=True)
    model = place(PAINTER, heard)
    assert model == place(PAINTER, heard, safety=False)
    assert model == place(PAINTER, heard, offline=True)


def test_what_is_no_part_of_the_pipeline_is_not_fetched(served, heard):
    edit(served.repo(PAINTER) / "model_index.json", safety_checker=[None, None])
    place(PAINTER, heard)
    assert not set(OF_CHECKER) & set(fetched(served))


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (WEIGHTS, "has no weights that dbcap reads for its safety_checker"),
        (PROCESSOR, f"has no {PROCESSOR}, which its safety_checker needs; go without --safety"),
    ],
)
def test_a_model_that_names_one_and_lacks_it(gone, said, served, heard, copied):
    (served.repo(PAINTER) / gone).unlink()
    (copied / gone).unlink()
    for model in (PAINTER, copied):
        assert f"{model} {said}" in refusal(model, heard)
        place(model, heard, safety=False)


def test_a_folders_revision_is_not_its_checkers(home, heard, copied):
    before = place(copied, heard, safety=False)
    found = place(copied, heard)
    assert {file.name for file in found.files} - {file.name for file in before.files} == set(OF_CHECKER)
    edit(copied / PROCESSOR, do_convert_rgb=False)
    assert {place(copied, heard, safety=safety).revision for safety in (False, True)} == {found.revision}
    assert found.revision == before.revision
    assert found.parameters == before.parameters


def test_a_captioner_has_none(home, heard, tiny_captioner):
    given = {"kind": None, "offline": False, "events": heard, "home": paths.cache_dir()}
    assert locate(str(tiny_captioner), safety=True, **given) == locate(str(tiny_captioner), **given)
