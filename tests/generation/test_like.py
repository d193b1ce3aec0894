"""`dbcap generate --like`: pictures that say what cannot be true, and pictures whose files were moved."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dbcap.config.models import GenerateConfig
from dbcap.generation import like
from dbcap.generation.jobs import Job
from dbcap.generation.pictures import encoded, facts_of

HASH = "0123456789abcdef" * 4
SOUND = Job(HASH, "a dog", "", 0, 32, 32, "model", 3, 2.0)
INIT = {"init": HASH, "strength": 0.5}
LORA = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


def repaired(result, before):
    """Return whether a run made the pixels of an image again."""
    code, lines, _ = result
    return code == 0 and (np.array(Image.open(lines[0])) == np.array(Image.open(before))).all()


def write(job, **more):
    """Write picture.png with the facts of a job that has its key, and others in place of the usual ones."""
    how = {"model": "/no/model", "device": "cpu", "dtype": "float32", "threads": 1, "batch_size": 1, "row": 0}
    facts = how | {"lora": [], "embedding": [], "job": asdict(job)}
    try:
        facts["key"] = job.key
    except (TypeError, ValueError, OverflowError):  # there is none for these numbers
        facts["key"] = HASH
    kept = {name: value for name, value in (facts | more).items() if value != "absent"}
    Path("picture.png").write_bytes(encoded(np.zeros((8, 8, 3), np.uint8), "png", "", kept))


def test_sound_facts_are_taken(generate):
    write(replace(SOUND, model=HASH[:40], scheduler="euler", additions=((HASH, 0.5),)), embedding=["here"], model="a/b")
    Path("here").touch()
    recipe, config = like.read("picture.png", GenerateConfig(like="picture.png", low_memory=True, steps=9))
    assert recipe.job.additions == ((HASH, 0.5),)
    assert (config.model, config.embedding, config.low_memory) == ("a/b", ("here",), False)
    write(SOUND, low_memory=True, model="a/b")
    assert like.read("picture.png", GenerateConfig(like="picture.png"))[1].low_memory


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ({"prompt": " "}, "its prompt is empty"),
        ({"prompt": 5}, "job.prompt: "),
        ({"negative": None}, "job.negative: "),
        ({"seed": -1}, "--seed: -1 is not allowed"),
        ({"seed": 2**64}, "--seed: 18446744073709551616 is not allowed"),
        ({"seed": 10**30}, "--seed: 1"),
        ({"seed": "random"}, "job.seed: "),
        ({"width": 0}, "--width: 0 is not allowed"),
        ({"height": -64}, "--height: -64 is not allowed"),
        ({"height": 8196}, "--height: 8196 is not allowed"),
        ({"scheduler": "eular"}, "there is no scheduler 'eular'"),
        ({"steps": 0}, "--steps: 0 is not allowed"),
        ({"steps": -1}, "--steps: -1 is not allowed"),
        ({"steps": 5000}, "--steps: 5000 is not allowed"),
        ({"guidance": float("nan")}, "--guidance: "),
        ({"guidance": float("inf")}, "--guidance: "),
        ({"guidance": -5}, "--guidance: -5.0 is not allowed"),
        ({"guidance": 10**400}, "guidance: "),
        ({"guidance_rescale": 7}, "--guidance-rescale: 7.0 is not allowed"),
        ({"eta": 1.5}, "--eta: 1.5 is not allowed"),
        ({"long_prompt": "zz"}, "--long-prompt: 'zz' is not allowed"),
        ({"strength": 2}, "--strength: 2.0 is not allowed"),
        ({"init": HASH, "strength": 0}, "a strength of 0 leaves none of 3 steps"),
        ({"mask": HASH}, "it has a mask"),
        ({"model": "x\ny"}, "one of its hashes is none"),
        ({"model": ""}, "one of its hashes is none"),
        ({"init": "0" * 63}, "one of its hashes is none"),
        ({"additions": (("zz", 1.0),)}, "one of its hashes is none"),
        ({"additions": ((HASH, float("nan")),)}, "the scale of a LoRA is no finite number"),
        ({"additions": ((HASH, 1.0),)}, "it has not as many LoRA and embedding files as its job"),
        (INIT, "--init is missing"),
    ],
    ids=str,
)
def test_a_job_that_cannot_be(generate, job, said):
    write(replace(SOUND, **job))
    assert "--like: what picture.png says of itself is damaged: " in generate.refused("--like", "picture.png")
    assert said in generate.refused("--like", "picture.png", "--init", "5", "--mask", "5")


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"lora": 5}, "--lora: 5 is not allowed"),
        ({"lora": [1]}, "--lora: [1] is not allowed"),
        ({"lora": None}, "--lora: null is not allowed"),
        ({"embedding": 5}, "--embedding: 5 is not allowed"),
        ({"embedding": [{}]}, "--embedding: [{}] is not allowed"),
        ({"lora": ["a:1.0"]}, "it has not as many LoRA and embedding files as its job"),
        ({"base": ["x"]}, '--base: ["x"] is not allowed'),
        ({"init": 5}, "--init: 5 is not allowed"),
        ({"mask": {}}, "--mask: {} is not allowed"),
        ({"low_memory": "perhaps"}, "'perhaps' is not allowed"),
        ({"threads": 10**12}, "threads: "),
        ({"threads": 0}, "threads: "),
        ({"threads": "absent"}, "'threads' is missing"),
        ({"batch_size": "auto"}, "batch_size: "),
        ({"batch_size": 4097}, "batch_size: "),
        ({"row": -1}, "row: "),
        ({"row": 1}, "its row is not in its batch"),
        ({"device": "mine"}, "--device: 'mine' is not allowed"),
        ({"dtype": "x" * 5000}, "--dtype: 'xxx"),
        ({"model": None}, "--model: null is not allowed"),
        ({"model": "absent"}, "'model' is missing"),
        ({"key": HASH}, "its key is not that of its job"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_facts_that_cannot_be(generate, facts, said):
    write(SOUND, **facts)
    err = generate.refused("--like", "picture.png")
    assert said in err
    assert err.startswith("error: --like: what picture.png says of itself is damaged: ")
    assert len(err) < 500


@pytest.mark.parametrize(("side", "size"), [("width", 63), ("height", 2)])
def test_a_size_that_the_model_cannot_make(generate, tiny_diffusion, side, size):
    _, lines, _ = generate("a dog")
    job = facts_of(Path(lines[0]))["job"]
    write(Job(**{**job, side: size, "additions": ()}), model=str(tiny_diffusion))
    assert f"damaged: a {side} of {size} is no multiple of 4" in generate.refused(
        "--like", "picture.png", "-o", "again"
    )


def test_what_would_not_end_is_not_read(generate):
    for path in ("/dev/zero", "~/x", "gone\nline"):
        write(replace(SOUND, **INIT), init=path, model="a/b")
        assert " any more; give --init FILE, where it is now" in generate.refused("--like", "picture.png")


def test_a_model_that_was_moved(generate, tiny_diffusion, tiny_xl):
    place = Path("model").absolute()
    place.symlink_to(tiny_diffusion)
    _, lines, _ = generate("a red dog", model=place)
    assert repaired(generate("--like", lines[0], "-o", "there", model=tiny_xl), lines[0])
    place.unlink()
    assert repaired(generate("--like", lines[0], "-o", "again"), lines[0])
    assert f"the model {tiny_xl} is not what it was" in generate.refused(
        "--like", lines[0], "-o", "other", model=tiny_xl
    )
    assert f"there is no {place} any more; give --model MODEL" in generate.refused(
        "--like", lines[0], "-o", "other", model=None
    )


def test_a_model_in_one_file_and_its_base_that_were_moved(generate, family, tiny_diffusion):
    family(tiny_diffusion).write_single_file(Path("one.safetensors"))
    save_file(load_file("one.safetensors"), "bare.safetensors")
    Path("base").symlink_to(tiny_diffusion)
    _, lines, _ = generate("a red dog", "--base", "base", model="bare.safetensors")
    Path("bare.safetensors").rename("moved.safetensors")
    assert repaired(generate("--like", lines[0], "-o", "again", model="moved.safetensors"), lines[0])
    Path("base").unlink()
    words = ["--like", lines[0], "-o", "other"]
    assert "give --base FOLDER, where it is now" in generate.refused(*words, model="moved.safetensors")
    assert repaired(generate(*words, "--base", str(tiny_diffusion), model="moved.safetensors"), lines[0])


def test_an_init_and_a_mask_that_were_moved(generate):
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save("init.png")
    Image.linear_gradient("L").resize((32, 32)).rotate(90).save("mask.png")
    _, lines, _ = generate("a dog", "--init", "init.png", "--mask", "mask.png")
    again = ["--like", lines[0], "-o", "again"]
    Path("mask.png").rename("white.png")
    assert "mask.png any more; give --mask FILE, where it is now" in generate.refused(*again)
    assert repaired(generate(*again, "--mask", "white.png"), lines[0])
    assert "the mask init.png is not what it was" in generate.refused(
        "--like", lines[0], "-o", "other", "--mask", "init.png"
    )
    Path("init.png").rename("first.png")
    assert "init.png any more; give --init FILE, where it is now" in generate.refused(*again, "--mask", "white.png")
    words = ["--like", lines[0], "-o", "third", "--mask", "white.png", "--init"]
    assert "the picture white.png is not what it was" in generate.refused(*words, "white.png")
    assert repaired(generate(*words, "first.png"), lines[0])


def test_a_lora_and_an_embedding_that_were_moved(generate):
    random = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 64, generator=random), torch.randn(64, 4, generator=random)
    save_file({f"{LORA}.lora_down.weight": down, f"{LORA}.lora_up.weight": up}, "l.safetensors")
    save_file({"emb_params": torch.randn(1, 32, generator=random)}, "word.safetensors")
    code, lines, err = generate("a word", "--lora", "l.safetensors:0.5", "--embedding", "word.safetensors")
    assert code == 0, err
    Path("moved").mkdir()
    again = ["--like", lines[0], "-o", "again"]
    Path("l.safetensors").rename("moved/l.safetensors")
    assert "l.safetensors any more; give --lora FILE:0.5, where it is now" in generate.refused(*again)
    changed = "a LoRA or embedding file is not what it was: "
    assert "give --lora FILE:0.5, where it is now" in generate.refused(*again, "--lora", "moved/l.safetensors")
    assert changed in generate.refused(*again, "--lora", "word.safetensors:0.5")
    both = ["--lora", "word.safetensors", "--lora", "moved/l.safetensors:0.5"]
    assert "it was made with 2 LoRA and embedding files, and 3 are given" in generate.refused(*again, *both)
    assert repaired(generate(*again, "--lora", "moved/l.safetensors:0.5"), lines[0])
    Path("word.safetensors").rename("moved/word.safetensors")
    words = ["--like", lines[0], "-o", "other", "--lora", "moved/l.safetensors:0.5"]
    assert "word.safetensors any more; give --embedding FILE, where it is now" in generate.refused(*words)
    assert changed in generate.refused(*words, "--embedding", "moved/l.safetensors")
    assert repaired(generate(*words, "--embedding", "moved/word.safetensors"), lines[0])


def test_what_a_picture_was_made_without_is_not_added(generate):
    _, lines, _ = generate("a dog")
    Image.new("RGB", (32, 32)).save("init.png")
    Path("dbcap.toml").write_text('[generate]\nlora = ["no.safetensors"]\nbase = "nowhere"\n')
    result = generate("--like", lines[0], "-o", "again", "--init", "init.png")
    assert repaired(result, lines[0])
    facts = facts_of(Path(result[1][0]))
    assert (facts["lora"], "init" in facts, "base" in facts) == ([], False, False)
