"""`dbcap generate` by ONNX files: torch's pictures, the same promises, and what they cannot do is said in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dbcap.cli.app import run as command
from dbcap.events import Silent
from dbcap.exporting import diffusion
from dbcap.generation.pictures import facts_of
from dbcap.models.hub import locate


def pixels(path):
    return np.array(Image.open(path).convert("RGB")).astype(int)


def far(one, other):
    return np.abs(pixels(one) - pixels(other)).max()


@pytest.fixture(scope="module")
def exported(tiny_diffusion, tmp_path_factory):
    """The tiny model, exported."""
    place = tmp_path_factory.mktemp("exported")
    local = locate(str(tiny_diffusion), kind="diffusion", offline=True, events=Silent(), home=place / "cache")
    (place / "onnx").mkdir()
    diffusion.write(local, place / "onnx", "fp32")
    return place / "onnx"


@pytest.fixture
def both(tiny_diffusion, exported, tmp_path):
    """A folder with files for either engine."""
    folder = shutil.copytree(tiny_diffusion, tmp_path / "both")
    return shutil.copytree(exported, folder, dirs_exist_ok=True)


def test_pictures_are_those_of_torch(generate, exported):
    _, torchs, _ = generate("a red dog", "a cat", "--width", "44")
    code, lines, err = generate("a red dog", "a cat", "--width", "44", "--out", "onnx", "--verbose", model=exported)
    assert code == 0
    assert "engine: ONNX Runtime on the CPU" in err
    assert max(far(one, other) for one, other in zip(torchs, lines, strict=True)) <= 1
    assert facts_of(Path(lines[0]))["engine"] == "onnx"
    assert "engine" not in facts_of(Path(torchs[0]))
    code, again, _ = generate("--like", lines[1], "--out", "again")
    assert (code, Path(again[0]).read_bytes()) == (0, Path(lines[1]).read_bytes())


def test_the_engine_is_chosen_where_there_are_files_for_both(generate, both):
    _, own, _ = generate("a dog", model=both)
    _, torchs, _ = generate("a dog", "--engine", "torch", "--out", "torch", model=both)
    _, lines, _ = generate("a dog", "--engine", "onnx", "--out", "onnx", model=both)
    assert ["engine" in facts_of(Path(line)) for line in (*own, *torchs, *lines)] == [False, False, True]
    code, again, _ = generate("--like", lines[0], "--out", "again")
    assert (code, facts_of(Path(again[0]))["engine"]) == (0, "onnx")
    assert facts_of(Path(own[0]))["job"]["model"] != facts_of(Path(lines[0]))["job"]["model"]


def test_batches_make_equal_pictures(generate, exported):
    made = []
    for size in ("1", "3"):
        _, lines, _ = generate("a dog", "-n", "3", "--batch-size", size, "--out", size, model=exported)
        made.append(lines)
    assert max(far(one, other) for one, other in zip(*made, strict=True)) <= 1


def test_a_picture_to_begin_with_and_tiles(generate, exported):
    Image.linear_gradient("L").resize((48, 32)).convert("RGB").save("init.png")
    mask = Image.new("L", (48, 32))
    mask.paste(255, (24, 0, 48, 32))
    mask.save("mask.png")
    words = ["a dog", "--init", "init.png", "--mask", "mask.png", "--strength", "0.7", "--low-memory"]
    _, torchs, _ = generate(*words, "--width", "96", "--height", "64")
    code, lines, _ = generate(*words, "--width", "96", "--height", "64", "--out", "onnx", model=exported)
    assert code == 0
    assert far(torchs[0], lines[0]) <= 1


def test_what_it_cannot_do_is_one_line(generate, exported):
    save_file({"word": torch.zeros(1, 32)}, "word.safetensors")
    for words, said in (
        (["--engine", "torch"], "has ONNX files only; leave out --engine torch"),
        (["--device", "cuda"], "the ONNX engine runs on the CPU, not on cuda"),
        (["--dtype", "bfloat16"], "the number format of"),
        (["--embedding", "word.safetensors"], "has ONNX files, to which word.safetensors cannot be added"),
    ):
        assert said in generate.refused("a dog", *words, model=exported)
    for variant in ("int8", "fp32", "int7"):
        said = f"{exported} is a diffusion pipeline, whose folder has one precision; leave out :{variant}"
        assert said in generate.refused("a dog", model=f"{exported}:{variant}")


def test_embeddings_are_refused_whatever_their_word_is(generate, exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "taught")
    (folder / "dbcap.json").write_text('{"identifier": "ab", "class": "dog"}')
    save_file({"word": torch.zeros(1, 32)}, "word.safetensors", {"dbcap": '{"identifier": "cd", "class": "dog"}'})
    said = "has ONNX files, to which word.safetensors cannot be added"
    assert said in generate.refused("a dog", "--embedding", "word.safetensors", model=folder)


def test_what_it_does_without_is_said(generate, exported):
    code, _, err = generate("a dog", "--compile", "--safety", model=exported)
    assert code == 0
    assert "--compile is left out" in err
    assert "has no safety checker" in err


def test_a_model_without_onnx_files(generate, tiny_diffusion, write_run):
    (Path("one.safetensors")).write_bytes(b"")
    write_run(model=str(tiny_diffusion))
    for model in (tiny_diffusion, "run:dog-1", "./one.safetensors"):
        code, lines, err = generate("a dog", "--engine", "onnx", model=model)
        assert (code, lines, err.count("\n")) == (1, [], 1)
        assert f"{model} has no ONNX files; `dbcap export {model} --onnx` makes them" in err


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("unet", "unet/model.onnx is damaged"),
        ("vae_decoder/config.json", "there is no"),
        ("text_encoder", "has no ONNX"),
    ],
)
def test_a_damaged_folder_is_one_line(generate, exported, tmp_path, part, said):
    folder = shutil.copytree(exported, tmp_path / "broken")
    path = folder / part
    if part == "unet":
        (path / "model.onnx").write_bytes(b"nothing of the kind")
    elif path.is_dir():
        (path / "model.onnx").unlink()
    else:
        path.unlink()
    code, lines, err = generate("a dog", model=folder)
    assert (code, lines, err.count("\n")) == (1, [], 1)
    assert said in err or "has no vae_decoder/config.json" in err


def test_a_graph_of_another_kind_is_one_line(generate, exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "broken")
    shutil.copyfile(folder / "vae_decoder/model.onnx", folder / "unet/model.onnx")
    code, lines, err = generate("a dog", model=folder)
    assert (code, lines, err.count("\n")) == (1, [], 1)
    assert "unet/model.onnx is not what dbcap or Optimum export: it asks for latent_sample" in err


def test_a_graph_that_does_not_fit_the_others_is_one_line(generate, exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "broken")
    path = folder / "text_encoder/model.onnx"
    model = onnx.load(path)
    (given,) = (value for value in model.graph.output if value.name == "last_hidden_state")
    for node in model.graph.node:
        node.output[:] = ["wide" if name == given.name else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Concat", ["wide", "wide"], [given.name], axis=2))
    del given.type.tensor_type.shape.dim[:]
    onnx.save(model, path)
    code, lines, err = generate("a dog", model=folder)
    assert (code, lines, err.count("\n")) == (1, [], 1)
    assert "unet/model.onnx cannot be run: " in err
    assert "export the model again" in err


def test_an_export_without_a_file_is_made_again(generate, exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "export")
    (folder / "export.json").write_text('{"files": [{"name": "unet/model.onnx", "variant": "fp32"}]}')
    for missing in ("text_encoder/model.onnx", "unet/model.onnx"):
        (folder / missing).unlink()
        for words in ([], ["--engine", "onnx"]):
            code, lines, err = generate("a dog", *words, model=folder)
            assert (code, lines, err.count("\n")) == (1, [], 1)
            assert err.endswith("it is an export and not whole: export the model again\n")


def test_it_is_not_trained(home, exported, tiny_dataset, capfd):
    code = command(["train", str(tiny_dataset), "--model", str(exported), "--no-progress"])
    err = capfd.readouterr().err
    assert (code, err.count("\n")) == (2, 1)
    assert "has ONNX files only; train on the model that they were made of" in err


def test_what_is_there_is_shown(home, exported, capfd):
    assert command(["models", "show", str(exported), "--json"]) == 0
    names = [file["name"] for file in json.loads(capfd.readouterr().out)["files"]]
    assert "vae_decoder/model.onnx" in names
    assert "vae_decoder/config.json" in names
