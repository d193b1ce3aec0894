"""`dbcap generate --safety`: what the model's safety checker flags is not written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from dbcap.cli.app import run as command
from dbcap.generation.pictures import facts_of

QUICK = ["--steps", "2", "--guidance", "2", "--dtype", "float32", "--no-progress"]
FLAGGED = "the image of seed {} failed: the model's safety checker flags it; use another --seed or prompt"


@pytest.fixture
def generate(home, tmp_path, monkeypatch, capfd):
    """Return a function that runs the command in an empty folder: exit code, lines of stdout, stderr."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def call(model, *words):
        capfd.readouterr()  # writing a model shows a bar
        code = command(["generate", *words, "--model", str(model), *QUICK])
        out, err = capfd.readouterr()
        return code, out.splitlines(), err

    return call


def pixels(path):
    return np.array(Image.open(path).convert("RGB"))


def test_flagged_images_fail_and_are_not_written(generate, checked):
    code, lines, err = generate(checked(-2), "a dog", "-n", "2", "--safety", "--seed", "7", "--grid", "grid.png")
    assert (code, lines) == (3, [])
    assert err.splitlines() == [f"failed: {FLAGGED.format(7)}", f"failed: {FLAGGED.format(8)}", "0 made, 2 failed"]
    assert not Path("outputs").exists()
    assert not Path("grid.png").exists()
    code, lines, err = generate(checked(-2), "a dog", "-n", "2", "--safety", "--on-error", "stop")
    assert (code, lines, err) == (1, [], f"error: {FLAGGED.format(0)}\n")


def test_checked_images_are_those_that_are_made_without_and_say_so(generate, checked):
    code, lines, err = generate(checked(2), "a dog", "-n", "2", "--safety", "--format", "jsonl")
    assert (code, err) == (0, "2 made\n")
    made = [json.loads(line) for line in lines]
    assert [one["safety"] for one in made] == [True, True]
    paths = [one["path"] for one in made]
    assert [facts_of(Path(path))["safety"] for path in paths] == [True, True]
    code, again, err = generate(checked(2), "a dog", "-n", "2")
    assert (code, again) == (0, paths)
    assert err.startswith("0 made, 2 there already")
    _, plain, _ = generate(checked(2), "a dog", "-n", "2", "--out", "plain")
    assert all("safety" not in facts_of(Path(path)) for path in plain)
    assert all((pixels(one) == pixels(other)).all() for one, other in zip(plain, paths, strict=True))
    assert generate(checked(2), "a dog", "-n", "2", "--out", "plain", "--safety")[2].startswith("0 made, 2 there")


@pytest.mark.parametrize("safety", [[], ["--safety"]])
def test_a_checked_image_is_made_again(safety, generate, checked):
    _, lines, _ = generate(checked(2), "a dog", "--safety")
    code, again, _ = generate(checked(2), "--like", lines[0], "--out", "again", *safety)
    assert code == 0
    assert (pixels(again[0]) == pixels(lines[0])).all()
    assert (facts_of(Path(again[0])) == facts_of(Path(lines[0]))) == bool(safety)


def test_a_model_without_a_checker_says_so_once(generate, tiny_diffusion, tiny_xl):
    for model in (tiny_diffusion, tiny_xl):
        code, lines, err = generate(model, "a dog", "-n", "2", "--safety", "--out", model.name)
        assert (code, len(lines)) == (0, 2)
        assert err == f"warning: {model} has no safety checker: images are not checked\n2 made\n"
        assert "safety" not in facts_of(Path(lines[0]))
    assert "warning" not in generate(tiny_diffusion, "a dog", "--safety", "--out", "sd", "--dry-run")[2]


def test_a_model_in_one_file_has_none_even_if_its_base_has(generate, checked, family):
    family(checked(-2)).write_single_file(Path("one.safetensors"))
    for words in ([], ["--base", str(checked(-2)), "--seed", "1"]):
        code, lines, err = generate("one.safetensors", "a dog", "--safety", *words)
        assert (code, len(lines)) == (0, 1)
        assert err == "warning: one.safetensors has no safety checker: images are not checked\n1 made\n"


def test_which_are_flagged_does_not_depend_on_the_batch(generate, checked, dividing):
    _, plain, _ = generate(checked(2), "a dog", "-n", "6")
    threshold, made = dividing([pixels(path) for path in plain]), []
    for size in ("1", "4"):
        words = ["a dog", "-n", "6", "--safety", "--batch-size", size, "--out", size]
        code, lines, err = generate(checked(threshold), *words)
        assert code == 3
        assert err.count("flags it") == 6 - len(lines)
        made.append([Path(line).name for line in lines])
    assert made[0] == made[1]
    assert 0 < len(made[0]) < 6


def test_a_checker_that_is_not_whole_is_one_line_before_anything_is_made(generate, checked, tmp_path):
    folder = shutil.copytree(checked(2), tmp_path / "model")
    file = folder / "safety_checker/model.safetensors"
    save_file({name: one for name, one in load_file(file).items() if name != "concept_embeds"}, file)
    code, lines, err = generate(folder, "a dog", "--safety")
    assert (code, lines) == (1, [])
    assert f"the safety_checker of {folder} lacks the weight concept_embeds" in err
    assert err.count("\n") == 1
    assert generate(folder, "a dog")[0] == 0
