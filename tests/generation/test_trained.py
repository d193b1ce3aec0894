"""`dbcap generate --model run:NAME`: the images are those of the model that was trained, and say so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dbcap import runs
from dbcap.events import Silent
from dbcap.generation.pictures import encoded, facts_of
from dbcap.models.hub import locate

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
PROMPT = "a photo of [V] {class}"


def pixels(path):
    return np.array(Image.open(path).convert("RGB")).tolist()


def facts(path):
    return facts_of(Path(path))


def revision(folder: Path, tmp_path: Path) -> str:
    return locate(str(folder), kind="diffusion", offline=True, events=Silent(), home=tmp_path).revision


@pytest.fixture
def trained_on(write_run, tiny_diffusion, tmp_path):
    """Return a function that writes a run on the tiny model; a word that its tokenizer has is the identifier."""

    def call(**said):
        return write_run(model=str(tiny_diffusion), revision=revision(tiny_diffusion, tmp_path), **said)

    return call


def with_weights(folder, target, states):
    """Copy a pipeline with other weights for some parts, by diffusers' own means, and the words of a run."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    for part, state in states.items():
        getattr(pipeline, part).load_state_dict(state)
    pipeline.save_pretrained(target)
    (target / "dbcap.json").write_text(json.dumps({"identifier": "sks", "class": "dog"}))
    return target


def other_weights(folder, seed):
    """Return state dicts of both trained parts, as their modules name the weights, a little changed."""
    from diffusers import StableDiffusionPipeline

    pipeline, random = StableDiffusionPipeline.from_pretrained(folder), torch.Generator().manual_seed(seed)
    return {
        part: {
            name: tensor + 0.05 * torch.randn(tensor.shape, generator=random) if tensor.is_floating_point() else tensor
            for name, tensor in getattr(pipeline, part).state_dict().items()
        }
        for part in ("unet", "text_encoder")
    }


def file_of(method, folder):
    """Write what a method leaves in a folder."""
    folder.mkdir(parents=True)
    if method == "lora":
        drawn = torch.Generator().manual_seed(1)
        halves = {f"unet.{LAYER}.lora_A.weight": (4, 64), f"unet.{LAYER}.lora_B.weight": (64, 4)}
        save_file(
            {name: torch.randn(shape, generator=drawn) for name, shape in halves.items()}, folder / "lora.safetensors"
        )
        return folder / "lora.safetensors"
    save_file({"<dog-1>": torch.randn(1, 32, generator=torch.Generator().manual_seed(1))}, folder / "dog-1.safetensors")
    return folder / "dog-1.safetensors"


def test_a_finished_run_makes_the_images_of_its_final_folder(generate, trained_on, tiny_diffusion):
    run = trained_on()
    with_weights(tiny_diffusion, run.final, other_weights(tiny_diffusion, 0))
    code, (line,), err = generate(PROMPT, model="run:dog-1")
    assert (code, err.splitlines()[-1]) == (0, "1 made")  # diffusers shows a bar before
    assert (facts(line)["model"], facts(line)["job"]["prompt"]) == ("run:dog-1", "a photo of sks dog")
    assert "Model: dog-1" in Image.open(line).info["parameters"]
    _, (of_folder,), err = generate(PROMPT, "--out", "folder", model=run.final)
    assert pixels(of_folder) == pixels(line)
    assert facts(of_folder)["key"] == facts(line)["key"]
    assert generate(PROMPT, "--out", "folder", model="run:dog-1")[2].startswith("0 made, 1 there already")
    _, (plain,), _ = generate("a photo of sks dog", "--out", "plain")
    assert pixels(plain) != pixels(line)


def test_checkpoints_make_the_images_of_pipelines_with_their_weights(
    generate, trained_on, write_checkpoint, tiny_diffusion, tmp_path
):
    run = trained_on(status="interrupted", step=20)
    states = {step: other_weights(tiny_diffusion, step) for step in (10, 20)}
    for step, parts in states.items():
        files = {f"weights/{part}.safetensors": state for part, state in parts.items()}
        write_checkpoint(run, step, files, best=step == 10)
    made = {}
    for step, name in ((10, "best"), (20, "last")):
        folder = with_weights(tiny_diffusion, tmp_path / str(step), states[step])
        _, (expected,), _ = generate(PROMPT, "--out", f"folder{step}", model=folder)
        _, (line,), _ = generate(PROMPT, "--out", f"run{step}", model=f"run:dog-1@{name}")
        assert pixels(line) == pixels(expected)
        assert facts(line)["model"] == f"run:dog-1@{step}"
        made[step] = pixels(line)
    assert made[10] != made[20]
    code, lines, err = generate(PROMPT, model="run:dog-1")
    assert (code, lines) == (1, [])
    assert "the run dog-1 is not finished, but interrupted; run:dog-1@last is its newest checkpoint, of step 20" in err
    refused = generate.refused(PROMPT, model="run:dog-1@15")
    assert refused == "error: the run dog-1 has no checkpoint 15; there are 10, 20\n"


@pytest.mark.parametrize(("method", "word"), [("lora", "sks"), ("embedding", "<dog-1>")])
def test_an_adapter_makes_the_images_of_its_file_on_the_model_before(
    generate, trained_on, write_checkpoint, method, word
):
    run = trained_on(method=method, identifier=word)
    path = file_of(method, run.final)
    write_checkpoint(run, 10, {"weights/adapter.safetensors": load_file(path)})
    prompt = f"a photo of {word} dog"
    _, (plain,), _ = generate(prompt, "--out", "plain")
    _, (expected,), _ = generate(prompt, f"--{method}", str(path))
    for model in ("run:dog-1", "run:dog-1@10"):
        code, (line,), _ = generate(PROMPT, "--out", model[4:], model=model)
        assert code == 0
        assert pixels(line) == pixels(expected) != pixels(plain)
        assert facts(line)["key"] == facts(expected)["key"] != facts(plain)["key"]
        assert (facts(line)["model"], facts(line)["lora"], facts(line)["embedding"]) == (model, [], [])


def test_a_run_and_files_that_the_user_adds(generate, trained_on, tmp_path):
    run = trained_on(method="embedding", identifier="<dog-1>")
    embedding, lora = file_of("embedding", run.final), file_of("lora", tmp_path / "lora")
    words = ["a <dog-1>", "--lora", f"{lora}:0.5"]
    _, (expected,), _ = generate(*words, "--embedding", str(embedding))
    _, (line,), _ = generate(*words, "--out", "run", model="run:dog-1")
    assert pixels(line) == pixels(expected)
    assert facts(line)["key"] == facts(expected)["key"]
    assert facts(line)["lora"] == [f"{lora}:0.5"]
    _, (again,), _ = generate("--like", line, "--out", "again", model=None)
    assert Path(again).read_bytes() == Path(line).read_bytes()


# ---- --like


def test_like_finds_the_run_again(generate, trained_on, write_checkpoint, tiny_diffusion):
    run = trained_on()
    with_weights(tiny_diffusion, run.final, other_weights(tiny_diffusion, 0))
    parts = {f"weights/{part}.safetensors": state for part, state in other_weights(tiny_diffusion, 1).items()}
    write_checkpoint(run, 10, parts)
    for model in ("run:dog-1", "run:dog-1@last"):
        _, (line,), _ = generate(PROMPT, "--out", f"first{model[9:]}", model=model)
        code, (again,), _ = generate("--like", line, "--out", f"again{model[9:]}", model=None)
        assert (code, Path(again).read_bytes()) == (0, Path(line).read_bytes())


def test_like_of_a_run_that_was_removed_takes_what_is_named(generate, trained_on, tiny_diffusion, tmp_path):
    run = trained_on(method="lora")
    kept = shutil.copy(file_of("lora", run.final), tmp_path)
    _, (line,), _ = generate(PROMPT, model="run:dog-1")
    runs.remove(run)
    gone = "--like: there is no run:dog-1 any more; give --model MODEL, where it is now"
    assert gone in generate.refused("--like", line, model=None)
    assert "made with 1 LoRA and embedding files, and 0 are given" in generate.refused("--like", line)
    code, (again,), _ = generate("--like", line, "--lora", str(kept), "--out", "again")
    assert (code, pixels(again)) == (0, pixels(line))


def test_like_of_a_run_that_went_on_is_refused(generate, trained_on):
    run = trained_on(method="lora")
    path = file_of("lora", run.final)
    _, (line,), _ = generate(PROMPT, model="run:dog-1")
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    said = f"a LoRA or embedding file is not what it was: {path}:1.0; its run went on since"
    assert said in generate.refused("--like", line, model=None)


def test_like_believes_no_picture_about_what_a_run_brought(generate, trained_on, tiny_diffusion):
    run = trained_on()
    shutil.copytree(tiny_diffusion, run.final)
    _, (line,), _ = generate("a dog", model="run:dog-1")
    said = facts(line) | {"lora": ["a:1.0"]}
    Path("odd.png").write_bytes(encoded(np.zeros((8, 8, 3), np.uint8), "png", "", said))
    assert "it has not as many LoRA and embedding files as its job" in generate.refused("--like", "odd.png")


# ---- names


def test_names_hold_the_run_and_the_step(generate, trained_on, write_checkpoint):
    run = trained_on(name="Dog_1.2", method="lora")
    path = file_of("lora", run.final)
    other = {name: tensor + 1 for name, tensor in load_file(path).items()}
    write_checkpoint(run, 10, {"weights/adapter.safetensors": other})
    name = ["--name", "{run}-{step:06d}-{index}"]
    assert generate("a dog", *name, model="run:Dog_1.2")[1] == ["outputs/Dog_1.2-000400-0.png"]
    assert generate("a dog", *name, model="run:Dog_1.2@best")[0] == 2
    assert generate("a dog", *name, model="run:Dog_1.2@last")[1] == ["outputs/Dog_1.2-000010-0.png"]


def test_names_of_what_no_run_made_hold_the_title(generate, tiny_diffusion, hub, tmp_path):
    shutil.copytree(tiny_diffusion, tmp_path / "My Model")
    _, lines, _ = generate("a dog", "--name", "{run}-{step}-{seed}", model=tmp_path / "My Model")
    assert lines == ["outputs/my-model-0-0.png"]
    shutil.copytree(tiny_diffusion, hub().repo("org/name"), dirs_exist_ok=True)
    _, lines, _ = generate("a dog", "--name", "{run}-{step}-{seed}", "--out", "hub", model="org/name")
    assert lines == ["hub/org-name-0-0.png"]
