"""A whole model in one file: what is in its header, where configs come from, and the same pictures as its folder's."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dbcap.config import paths
from dbcap.errors import ModelError, UsageError
from dbcap.models import single_file
from dbcap.models.families import load
from dbcap.models.hub import locate
from dbcap.models.identity import Identity
from dbcap.models.reports import inspect
from dbcap.models.single_file import FILES, read
from dbcap.testing.diffusion import write_diffusion


def find(text, heard, base=None):
    return locate(
        str(text), kind="diffusion", base=base and str(base), offline=True, events=heard, home=paths.cache_dir()
    )


def bare(path, target):
    """Write a file's weights alone, as other tools leave them."""
    save_file(load_file(path), target, {"format": "pt"})
    return target


@pytest.fixture(params=["sd", "xl", "inpainting"])
def pair(request, home, family, tmp_path):
    """A folder and the file that is made of it."""
    folder = write_diffusion(tmp_path / "folder", xl=request.param == "xl", inpaints=request.param == "inpainting")
    path = tmp_path / "one.safetensors"
    family(folder).write_single_file(path)
    return folder, path


def run(model):
    """Return all that a model does to given numbers: what it knows of a prompt, a step, a picture and its latents."""
    size = (model.size, model.size)
    channels = 9 if model.inpaints else 4
    condition = model.encode("a red dog", 1, size)
    drawn = torch.Generator().manual_seed(0)
    latents = torch.randn(1, channels, 8, 8, generator=drawn)
    with torch.inference_mode():
        step = model.predict(latents, torch.tensor(500), [condition])
    picture = model.decode(latents[0, :4])
    return [condition.states, *condition.added.values(), step, picture, model.encode_picture(picture)]


def test_a_file_gives_what_its_folder_gives(pair, family, heard):
    folder, path = pair
    expected = run(family(folder))
    for found in (find(path, heard), find(bare(path, path.with_name("bare.safetensors")), heard, folder)):
        assert all(map(torch.equal, run(load(found, "cpu", "float32")), expected))
        assert found.parameters == family(folder).parameters


def test_diffusers_makes_the_same_picture_of_a_file(home, family, tiny_diffusion, tmp_path):
    # Of XL see test_original.py: diffusers tells its encoders apart by their widths, and the tiny ones have one width.
    path = tmp_path / "one.safetensors"
    family(tiny_diffusion).write_single_file(path)
    one, other = (
        pipeline("a dog", num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="np").images
        for pipeline in (
            StableDiffusionPipeline.from_pretrained(tiny_diffusion),
            StableDiffusionPipeline.from_single_file(str(path), config=str(tiny_diffusion), local_files_only=True),
        )
    )
    assert (one == other).all()


def test_a_file_stands_for_itself_and_its_configs(pair, heard, tmp_path):
    folder, path = pair
    found = find(path, heard)
    assert find(path, heard).revision == found.revision
    alone = bare(path, tmp_path / "bare.safetensors")
    one, other = tmp_path / "one", tmp_path / "other"
    for base in (one, other):
        shutil.copytree(folder, base)
    scheduler = other / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("scaled_linear", "linear"))
    revisions = {find(alone, heard, one).revision, find(alone, heard, other).revision, found.revision}
    assert len(revisions) == 3
    assert find(path, heard, other).folder == other, "what the user names counts more than the header"


def test_number_formats_are_kept(tmp_path, family, home):
    folder = write_diffusion(tmp_path / "folder")
    for part in ("unet", "vae", "text_encoder"):
        for path in (folder / part).glob("*.safetensors"):
            save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    family(folder).write_single_file(tmp_path / "one.safetensors")
    assert {tensor.dtype for tensor in load_file(tmp_path / "one.safetensors").values()} == {torch.float16}


def test_an_identifier_comes_along(tmp_path, family, heard, home):
    folder = write_diffusion(tmp_path / "folder")
    (folder / "dbcap.json").write_text('{"identifier": "sks", "class": "dog"}')
    family(folder).write_single_file(tmp_path / "one.safetensors")
    model = load(find(tmp_path / "one.safetensors", heard), "cpu", "float32")
    assert model.identity_with([]) == Identity("sks", "dog")


# ---- where configs come from


@pytest.fixture
def alone(home, family, tiny_diffusion, tmp_path):
    """A file without configs."""
    family(tiny_diffusion).write_single_file(tmp_path / "one.safetensors")
    return bare(tmp_path / "one.safetensors", tmp_path / "bare.safetensors")


def test_without_configs_it_is_said_what_to_fetch_and_then_it_works(alone, heard, hub, tiny_diffusion, monkeypatch):
    repo = single_file.BASES["sd1"]
    with pytest.raises(ModelError) as failure:
        find(alone, heard)
    assert failure.value.exit_code == 1
    assert f"{repo} is not in the cache" in failure.value.message
    assert f"dbcap models pull {repo}" in str(failure.value.hint)
    assert "--base FOLDER" in str(failure.value.hint)
    assert repo in inspect(str(alone), offline=True, events=heard, home=paths.cache_dir()).problem
    shutil.copytree(tiny_diffusion, hub().repo(repo), dirs_exist_ok=True)
    locate(repo, kind="diffusion", offline=False, events=heard, home=paths.cache_dir())
    assert load(find(alone, heard), "cpu", "float32").size == 32
    assert not inspect(str(alone), offline=True, events=heard, home=paths.cache_dir()).problem


def test_a_base_must_be_a_folder_with_all_configs(alone, heard, tiny_diffusion, tmp_path):
    with pytest.raises(UsageError, match="there is no folder"):
        find(alone, heard, tmp_path / "absent")
    torn = tmp_path / "torn"
    shutil.copytree(tiny_diffusion, torn)
    (torn / "vae" / "config.json").unlink()
    with pytest.raises(ModelError, match="lacks a config or tokenizer of Stable Diffusion 1"):
        find(alone, heard, torn)


def test_a_base_needs_no_weights(alone, heard, tiny_diffusion, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_diffusion, base, ignore=shutil.ignore_patterns("*.safetensors"))
    assert load(find(alone, heard, base), "cpu", "float32").encode("a dog", 1, (32, 32)).states.isfinite().all()


def test_a_base_of_another_model_is_one_line(alone, heard, tmp_path):
    base = write_diffusion(tmp_path / "base")
    config = json.loads((base / "unet" / "config.json").read_text())
    (base / "unet" / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 48}))
    with pytest.raises(ModelError, match=r"of shape \[.*configs are those of another model"):
        _ = load(find(alone, heard, base), "cpu", "float32").unet


def test_a_base_is_for_files(heard, tiny_diffusion):
    with pytest.raises(UsageError, match=r"--base goes with a model that is a \.safetensors file"):
        find(tiny_diffusion, heard, tiny_diffusion)


# ---- what is no such file


def test_other_files_are_named(home, heard, tmp_path, alone):
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, lora)
    with pytest.raises(ModelError, match=r"is no whole Stable Diffusion model.*"):
        find(lora, heard)
    without = tmp_path / "without.safetensors"
    save_file({name: one for name, one in load_file(alone).items() if not name.startswith("first_stage")}, without)
    with pytest.raises(ModelError, match="is no whole Stable Diffusion model"):
        find(without, heard)
    with pytest.raises(UsageError, match="is a file, and a captioner is a folder"):
        locate(str(alone), offline=True, events=heard, home=paths.cache_dir())


def test_damaged_files_are_one_line(alone, heard, tiny_diffusion, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(alone.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"cut\.safetensors cannot be read"):
        find(cut, heard, tiny_diffusion)
    for document in ("[", "[]", '{"unet/config.json": 3}'):
        save_file(load_file(alone), cut, {FILES: document})
        with pytest.raises(ModelError, match=r"the configs in the header of .* are damaged"):
            find(cut, heard)


def test_names_in_a_header_lead_nowhere_else(alone, heard, tiny_diffusion, tmp_path):
    files = {name: (tiny_diffusion / name).read_text() for name in ("model_index.json", "unet/config.json")}
    evil = tmp_path / "evil.safetensors"
    save_file(load_file(alone), evil, {FILES: json.dumps(files | {"../../evil": "x", "/tmp/evil": "x"})})
    assert set(read(evil).files) == set(files)


def test_a_file_keeps_its_header_small_and_readable(pair):
    folder, path = pair
    with safe_open(path, "pt") as file:
        files = json.loads(file.metadata()[FILES])
    assert files["unet/config.json"] == (folder / "unet" / "config.json").read_text()
    assert not any(name.endswith(".safetensors") for name in files)
