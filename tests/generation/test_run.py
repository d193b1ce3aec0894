"""`dbcap generate` as its users run it: again, killed, beside another, with what is wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dbcap.files import Lock
from dbcap.generation.pictures import facts_of

QUICK = ["--steps", "3", "--guidance", "2", "--dtype", "float32", "--no-progress"]


def pixels(path):
    return np.array(Image.open(path).convert("RGB"))


def test_images_are_made_once(generate):
    code, lines, err = generate("a red dog", "-n", "3", "--seed", "1", "--grid", "grid.png")
    assert (code, lines) == (0, ["outputs/00000-1.png", "outputs/00001-2.png", "outputs/00002-3.png"])
    assert err == "3 made\n"
    assert Image.open("grid.png").size == (96, 32)
    first = [Path(line).read_bytes() for line in lines]
    assert len(set(first)) == 3
    code, again, err = generate("a red dog", "-n", "3", "--seed", "1")
    assert (code, again) == (0, lines)
    assert "0 made, 3 there already" in err
    assert "--seed random" in err
    assert [Path(line).read_bytes() for line in lines] == first


def test_what_is_missing_is_made_as_it_was(generate):
    _, lines, _ = generate("a red dog", "-n", "5", "--batch-size", "2")
    before = [Path(line).read_bytes() for line in lines]
    for number in (1, 2, 4):
        Path(lines[number]).unlink()
    code, again, err = generate("a red dog", "-n", "5", "--batch-size", "2")
    assert (code, again) == (0, lines)
    assert "3 made, 2 there already" in err
    assert [Path(line).read_bytes() for line in lines] == before


def test_a_picture_says_how_to_make_it_again(generate):
    _, lines, _ = generate("a red dog", "-n", "4", "--seed", "7", "--batch-size", "3", "--negative", "a cat")
    for line in lines:
        code, made, _ = generate("--like", line, "--out", "again")
        assert code == 0
        assert Path(made[0]).read_bytes() == Path(line).read_bytes()


def test_a_picture_is_made_again_from_any_folder(generate, tiny_diffusion, monkeypatch):
    Path("model").symlink_to(tiny_diffusion)
    _, lines, _ = generate("a red dog", model="./model")
    image = Path(lines[0]).absolute()
    assert "Sampler: DDIM," in Image.open(image).info["parameters"]
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    code, made, err = generate("--like", str(image), model="./nowhere")
    assert (code, err) == (0, "1 made\n")
    assert pixels(made[0]).tolist() == pixels(image).tolist()


def test_like_of_what_is_no_image_of_ours(generate):
    Image.new("RGB", (8, 8)).save("other.png")
    for words, said in (
        (["--like", "missing.png"], "no file missing.png"),
        (["--like", "other.png"], "does not say how it was made"),
        (["--like", "other.png", "a prompt"], "--like takes the prompt from the image"),
        ([], "there is no prompt"),
    ):
        code, lines, err = generate(*words)
        assert (code, lines) == (2, [])
        assert said in err
        assert err.count("\n") == 1


def test_other_settings_are_other_images(generate):
    _, first, _ = generate("a red dog")
    _, second, _ = generate("a red dog", "--guidance-rescale", "0.7")
    _, third, _ = generate("a red cat")
    names = [*first, *second, *third]
    assert names == ["outputs/00000-0.png", "outputs/00000-0-2.png", "outputs/00000-0-3.png"]
    assert len({Path(name).read_bytes() for name in names}) == 3


def test_rows_of_a_table_have_settings_of_their_own(generate):
    Path("prompts.csv").write_text("prompt,negative,seed,steps,size\na red dog,,5,2,32x64\na cat,a dog,,,\n")
    code, lines, _ = generate("@prompts.csv", "--format", "jsonl", "--seed", "9")
    assert code == 0
    jobs = [json.loads(line)["job"] for line in lines]
    assert [(j["prompt"], j["negative"], j["seed"], j["steps"], j["width"], j["height"]) for j in jobs] == [
        ("a red dog", "", 5, 2, 32, 64),
        ("a cat", "a dog", 9, 3, 32, 32),
    ]
    assert Image.open(json.loads(lines[0])["path"]).size == (32, 64)


def test_a_dry_run_makes_nothing(generate):
    code, lines, err = generate("a {red|blue} {dog|cat}", "--expand", "-n", "2", "--dry-run")
    assert (code, len(lines)) == (0, 8)
    assert lines[0] == "0\t32x32\tmissing\ta red dog"
    assert err == "8 of 8 images would be made\n"
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["a dog", "--scheduler", "dpm+"], 2, "did you mean dpm++"),
        (["a dog", "--width", "34"], 2, "a width of 34 is no multiple of 4; use 32 or 36"),
        (["a dog", "--strength", "2"], 2, "--strength"),
        (["[V] dog"], 2, "[V] stands for the model's identifier"),
        (["a {class}"], 2, "{class} stands for the model's class word"),
        (["@missing.txt"], 2, "missing.txt"),
        (["@empty.txt"], 2, "empty.txt holds no prompt"),
        (["@broken.csv"], 2, "broken.csv, line 3: steps = 'many' is not allowed"),
        (["a dog", "--init", "missing.png"], 1, "missing.png"),
        (["a dog", "--mask", "broken.csv"], 2, "--mask needs --init"),
        (["a dog", "--name", "same"], 2, "--name"),
        (["a dog", "--seed", str(2**64 - 1), "-n", "2"], 2, "the largest is"),
        (["a dog", "--max-time", "soon"], 2, "a time such as"),
        (["a dog " * 20, "--long-prompt", "error"], 2, "has 40 tokens, and the model reads 14"),
    ],
)
def test_what_is_wrong_is_one_line(generate, words, code, said):
    Path("empty.txt").write_text("\n\n")
    Path("broken.csv").write_text("prompt,steps\na dog,3\na cat,many\n")
    found, lines, err = generate(*words)
    assert (found, lines) == (code, [])
    assert said in err
    assert err.count("\n") == 1
    assert not Path("outputs").exists()


def test_a_missing_model_is_one_line(generate):
    code, lines, err = generate("a dog", model="./nowhere")
    assert (code, lines) == (1, [])
    assert "no such folder: ./nowhere" in err


def test_long_prompts_are_cut_and_that_is_said(generate):
    code, lines, err = generate("a dog " * 20, "a dog " * 7)
    assert code == 0
    assert err.count("left out") == 1
    assert "prompt 1: the prompt has 40 tokens, and the model reads 14: left out 26 tokens, 'a dog" in err
    assert (pixels(lines[0]) == pixels(lines[1])).all(), "what is left is the other prompt"
    code, chunked, err = generate("a dog " * 20, "--long-prompt", "chunk")
    assert (code, err) == (0, "1 made\n")
    assert (pixels(chunked[0]) != pixels(lines[0])).any()


def test_of_a_very_long_prompt_not_all_is_said_again(generate):
    code, _, err = generate("a dog " * 20_000)
    assert code == 0
    assert "left out 39986 tokens, 'a dog a dog a dog " in err
    assert len(re.search("'(a dog .*)[.]{3}'", err)[1]) == 57
    assert len(err) < 250


@pytest.mark.parametrize(
    ("dtype", "hint"),
    [("float32", "or a weight of the model or a LoRA is no number"), ("bfloat16", "or --dtype float32")],
)
def test_a_weight_that_is_no_number(generate, tiny_diffusion, tmp_path, dtype, hint):
    model = shutil.copytree(tiny_diffusion, tmp_path / "model")
    path = model / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.bias"][0] = torch.nan
    save_file(weights, path)
    code, lines, err = generate("a dog", "--dtype", dtype, model=model)
    assert (code, lines) == (3, [])
    assert f"failed: its numbers ran out of range; use less --guidance, {hint}\n" in err


def test_a_picture_to_begin_with_and_where_to_paint(generate):
    Image.linear_gradient("L").resize((48, 32)).convert("RGB").save("init.png")
    mask = Image.new("L", (48, 32))
    mask.paste(255, (24, 0, 48, 32))
    mask.save("mask.png")
    code, lines, _ = generate("a dog", "--init", "init.png", "--strength", "0.7")
    assert code == 0
    assert Image.open(lines[0]).size == (48, 32)
    code, masked, _ = generate("a dog", "--init", "init.png", "--mask", "mask.png", "--strength", "1")
    assert code == 0
    facts = facts_of(Path(masked[0]))
    assert facts["init"].endswith("init.png")
    code, again, _ = generate("--like", masked[0], "--out", "again")
    assert (code, Path(again[0]).read_bytes()) == (0, Path(masked[0]).read_bytes())
    mask.rotate(180).save("mask.png")
    code, _, err = generate("--like", masked[0], "--out", "other")
    assert code == 2
    assert "is not what it was" in err
    code, _, err = generate("a dog", "--init", "init.png", "--strength", "0.2")
    assert code == 2
    assert "leaves none of 3 steps; the smallest that leaves one is 0.3334" in err


def test_the_smallest_strength_that_is_named_works(generate):
    Image.new("RGB", (32, 32)).save("init.png")
    assert generate("a dog", "--init", "init.png", "--strength", "0.3334")[0] == 0


def test_the_end_of_the_time_is_no_failure(generate):
    code, lines, err = generate("a dog", "-n", "2", "--max-time", "0s")
    assert (code, lines) == (5, [])
    assert "2 left as --max-time is over; the same command goes on" in err


def test_one_at_a_time(generate):
    Path("outputs").mkdir()
    with Lock(Path("outputs/.dbcap.lock")):
        code, lines, err = generate("a dog")
        assert (code, lines) == (4, [])
        assert "another dbcap is at work" in err
        assert generate("a dog", "--dry-run")[0] == 0
    assert generate("a dog")[0] == 0
    assert sorted(os.listdir("outputs")) == ["00000-0.png", "jobs.jsonl"]


@pytest.mark.parametrize("existing", ["overwrite", "error"])
def test_images_that_are_there(generate, existing):
    _, lines, _ = generate("a dog")
    before = os.stat(lines[0])
    code, again, err = generate("a dog", "--existing", existing)
    if existing == "error":
        assert (code, again) == (2, [])
        assert "is there already" in err
    else:
        assert (code, again) == (0, lines)
        assert os.stat(lines[0]).st_ino != before.st_ino


@pytest.mark.parametrize(("kind", "ending"), [("webp", ".webp"), ("jpeg", ".jpg")])
def test_other_file_formats(generate, kind, ending):
    code, lines, _ = generate("a dog", "--image-format", kind)
    assert code == 0
    assert Path(lines[0]).suffix == ending
    assert facts_of(Path(lines[0]))["job"]["prompt"] == "a dog"
    assert generate("a dog", "--image-format", kind)[2].startswith("0 made, 1 there already")


def test_a_killed_run_goes_on_to_the_same_images(generate, tiny_diffusion):
    words = ["a red dog", "-n", "40", "--batch-size", "4", "--steps", "6"]
    started = [sys.executable, "-m", "dbcap", "generate", *words, "--model", str(tiny_diffusion), *QUICK[2:]]
    killed = subprocess.Popen([*started, "--out", "killed"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while not Path("killed").is_dir() or len(list(Path("killed").glob("*.png"))) < 6:
        assert killed.poll() is None, killed.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    left = len(list(Path("killed").glob("*.png")))
    assert 6 <= left < 40
    again = subprocess.run([*started, "--out", "killed"], check=True, capture_output=True, text=True)
    assert len(again.stdout.splitlines()) == 40
    assert f"{left} there already" in again.stderr or f"{left - 1} there already" in again.stderr
    whole = subprocess.run([*started, "--out", "whole"], check=True, capture_output=True, text=True)
    for one, two in zip(again.stdout.splitlines(), whole.stdout.splitlines(), strict=True):
        assert Path(one).read_bytes() == Path(two).read_bytes()


def test_a_lora_makes_other_images_and_is_part_of_the_recipe(generate):
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    random = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 64, generator=random), torch.randn(64, 4, generator=random)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, "l.safetensors")
    _, plain, _ = generate("a dog")
    code, full, _ = generate("a dog", "--lora", "l.safetensors")
    assert code == 0
    _, half, _ = generate("a dog", "--lora", "l.safetensors:0.5")
    assert len({Path(lines[0]).read_bytes() for lines in (plain, full, half)}) == 3
    assert generate("a dog", "--lora", "l.safetensors:1")[2].startswith("0 made, 1 there already")
    code, again, _ = generate("--like", half[0], "--out", "again")
    assert (code, Path(again[0]).read_bytes()) == (0, Path(half[0]).read_bytes())
    save_file({f"{name}.lora_down.weight": up.T.contiguous(), f"{name}.lora_up.weight": up}, "l.safetensors")
    code, _, err = generate("--like", half[0], "--out", "other")
    assert code == 2
    assert "a LoRA or embedding file is not what it was" in err
    save_file({f"{name}.odd": down}, "odd.safetensors")
    for words, said in (
        ("odd.safetensors", "does not know what"),
        ("missing.safetensors:2", "there is no file missing.safetensors"),
        ("l.safetensors:much", "'much' is no scale"),
    ):
        code, lines, err = generate("a cat", "--lora", words)
        assert (code, lines) == (2, [])
        assert said in err
        assert err.count("\n") == 1


def test_what_goes_on_after_a_random_seed_is_named(generate):
    code, _, err = generate("a dog", "-n", "2", "--seed", "random", "--max-time", "0s")
    assert code == 5
    seed = re.search(r"the same command with --seed (\d+) goes on", err)[1]
    _, lines, _ = generate("a dog", "-n", "2", "--seed", seed)
    assert [facts_of(Path(line))["job"]["seed"] for line in lines] == [int(seed), int(seed) + 1]


def test_a_prompt_that_becomes_empty_is_named(generate):
    code, lines, err = generate("{a dog|}", "--expand")
    assert (code, lines) == (2, [])
    assert "prompt 1: the prompt is empty" in err


def test_a_model_in_one_file_makes_the_same_images(generate, family, tiny_diffusion):
    family(tiny_diffusion).write_single_file(Path("one.safetensors"))
    save_file(load_file("one.safetensors"), "bare.safetensors")
    _, lines, _ = generate("a red dog", "-n", "2")
    for number, (model, words) in enumerate({"one": (), "bare": ("--base", str(tiny_diffusion))}.items()):
        out = f"out{number}"
        code, found, _ = generate("a red dog", "-n", "2", "--out", out, *words, model=f"{model}.safetensors")
        assert code == 0
        assert all((pixels(one) == pixels(other)).all() for one, other in zip(found, lines, strict=True))
        assert facts_of(Path(found[0]))["key"] != facts_of(Path(lines[0]))["key"]
        Path(f"{model}.safetensors").rename(f"{model}.keep")
        code, _, err = generate("--like", found[1], "--out", f"like{number}")
        assert code == 2
        assert "is not what it was" in err
        Path(f"{model}.keep").rename(f"{model}.safetensors")
        code, again, _ = generate("--like", found[1], "--out", f"like{number}")
        assert code == 0
        assert Path(again[0]).read_bytes() == Path(found[1]).read_bytes()


def test_a_file_without_configs_says_what_to_fetch(generate, family, tiny_diffusion):
    family(tiny_diffusion).write_single_file(Path("one.safetensors"))
    save_file(load_file("one.safetensors"), "bare.safetensors")
    code, lines, err = generate("a red dog", model="bare.safetensors")
    assert (code, lines) == (1, [])
    assert err.count("\n") == 1
    assert "dbcap models pull stable-diffusion-v1-5/stable-diffusion-v1-5" in err
    assert not Path("outputs").exists()


def test_a_run_that_finds_all_there_loads_neither_torch_nor_the_model(generate, tiny_diffusion):
    _, lines, _ = generate("a red dog", "-n", "2", "--grid", "grid.png")
    Path("grid.png").unlink()
    program = "import sys\nfrom dbcap.cli.app import run\nprint(run(sys.argv[1:]), 'torch' in sys.modules)"
    words = ["generate", "a red dog", "-n", "2", "--grid", "grid.png", "--model", str(tiny_diffusion), *QUICK]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [*lines, "0 False"]
    assert Path("grid.png").is_file()


@pytest.mark.parametrize("words", [["--device", "cuda:9"], ["--long-prompt", "error"]], ids=["device", "long prompt"])
def test_a_run_that_is_refused_leaves_no_folder(generate, words):
    code, lines, err = generate("dog " * 99, *words)
    assert code in (1, 2)
    assert (lines, err.count("\n")) == ([], 1)
    assert not Path("outputs").exists()
