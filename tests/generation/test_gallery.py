"""The output folder as users get it: grids in odd places, damaged images, small pictures, odd paths."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dbcap.generation import pictures
from dbcap.generation.pictures import facts_of


def stamp(name):
    state = os.lstat(name)
    return state.st_mode, state.st_ino, state.st_size, state.st_mtime_ns


@pytest.mark.parametrize(("ending", "kind"), [("png", "PNG"), ("webp", "WEBP"), ("jpg", "JPEG"), ("JPEG", "JPEG")])
def test_a_grid_has_the_format_of_its_name_and_is_written_again(generate, ending, kind):
    path = Path(f"grid.{ending}")
    assert generate("a dog", "--grid", str(path))[0] == 0
    assert generate("a dog", "-n", "2", "--grid", str(path))[0] == 0
    with Image.open(path) as image:
        assert (image.format, image.size) == (kind, (64, 32))
    assert pictures.is_grid(path)


def test_a_grid_goes_over_nothing_but_a_grid(generate):
    _, lines, _ = generate("a dog", "-n", "2")
    Image.new("RGB", (4, 4)).save("photo.png")
    os.mkfifo("pipe.png")
    Path("folder.png").mkdir()
    Path("link.png").symlink_to("nowhere")
    places = ["photo.png", "pipe.png", "folder.png", "link.png", lines[0], "outputs/jobs.jsonl"]
    before = [stamp(name) for name in places]
    for name in places[:-1]:
        assert f"--grid {name} is there, and is no grid of dbcap's" in generate.refused("a cat", "--grid", name)
    assert "must end in .png" in generate.refused("a cat", "--grid", places[-1])
    assert "must end in .png" in generate.refused("a cat", "--grid", "-")
    assert "there is no folder absent" in generate.refused("a cat", "--grid", "absent/grid.png")
    assert [stamp(name) for name in places] == before
    assert stat.S_ISFIFO(os.lstat("pipe.png").st_mode)
    assert sorted(os.listdir("outputs")) == ["00000-0.png", "00001-1.png", "jobs.jsonl"]


def test_a_grid_by_the_name_of_an_image_that_is_still_to_be_made(generate):
    code, lines, err = generate("a dog", "--grid", "outputs/00000-0.png")
    assert (code, lines) == (2, ["outputs/00000-0.png"])
    assert "is no grid" in err
    assert facts_of(Path(lines[0]))["job"]["prompt"] == "a dog"


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("damage", ["half", "empty", "other", "less one"])
def test_a_damaged_image_is_made_again(generate, kind, damage):
    words = ["a dog", "-n", "2", "--image-format", kind]
    _, lines, _ = generate(*words)
    path = Path(lines[1])
    whole = path.read_bytes()
    kept = {"half": whole[: len(whole) // 2], "empty": b"", "other": b"garbage", "less one": whole[:-1]}
    path.write_bytes(kept[damage])
    code, again, err = generate(*words)
    assert (code, err) == (0, "1 made, 1 there already\n")
    made = Path(again[1])
    assert made != path, "what stands there is left alone"
    assert made.read_bytes() == whole


def test_a_grid_of_an_image_that_cannot_be_read_names_it(generate):
    _, lines, _ = generate("a dog")
    data = bytearray(Path(lines[0]).read_bytes())
    start = data.index(b"IDAT") + 4
    data[start : start + 40] = bytes(40)
    Path(lines[0]).write_bytes(data)
    code, _, err = generate("a dog", "--grid", "grid.png")
    assert code == 1
    assert f"{lines[0]} cannot be read" in err
    assert "the same command makes it again" in err


@pytest.mark.parametrize("size", [(1, 1), (3, 64)])
def test_an_image_to_begin_with_that_is_too_small(generate, size):
    Image.new("RGB", size).save("small.png")
    assert f"--init small.png is {size[0]}x{size[1]} pixels only" in generate.refused("a dog", "--init", "small.png")
    code, lines, _ = generate("a dog", "--init", "small.png", "--width", "32", "--height", "32")
    assert (code, len(lines)) == (0, 1)


def test_tiles_are_told_and_made_again_by_like(generate):
    words = ["a dog", "--width", "64", "--height", "64", "--seed", "3"]
    _, (tiled,), _ = generate(*words, "--low-memory")
    _, (plain,), _ = generate(*words, "--out", "plain")
    assert facts_of(Path(tiled))["low_memory"] is True
    assert "low_memory" not in facts_of(Path(plain))
    assert (np.array(Image.open(tiled)) != np.array(Image.open(plain))).any()
    code, (again,), _ = generate("--like", tiled, "--out", "again")
    assert code == 0
    assert (np.array(Image.open(tiled)) == np.array(Image.open(again))).all()


def test_a_prompt_too_long_for_a_jpeg_fails_alone(generate):
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": "dog " * n}) + "\n" for n in (9, 20_000, 7)))
    code, lines, err = generate("@prompts.jsonl", "--image-format", "jpeg")
    assert (code, len(lines)) == (3, 2)
    assert "too long to be kept in a JPEG" in err


def test_a_home_in_settings_and_names_that_are_no_text(generate, home, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    Path("dbcap.toml").write_text('[generate]\nout = "~/pics"\n')
    _, lines, _ = generate("a dog")
    assert lines == [str(tmp_path / "here" / "pics" / "00000-0.png")]
    Path("dbcap.toml").write_text('[generate]\nout = "a\\u0000b"\n')
    assert "it must be text that is not empty" in generate.refused("a dog")
    Path("dbcap.toml").unlink()
    name = os.fsdecode(b"f\xfflder")
    assert generate("a dog", "--out", name)[0] == 0
    assert os.listdir(name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--negative", os.fsdecode(b"\xff")], "--negative is no UTF-8"),
        (["--max-time", "9" * 400 + "h"], "it must be a time such as"),
        (["--out", "prompts.txt"], "--out prompts.txt is no folder"),
        (["--out", "prompts.txt", "--dry-run"], "--out prompts.txt is no folder"),
    ],
)
def test_what_is_refused_in_one_line(generate, words, message):
    Path("prompts.txt").write_text("a dog")
    assert message in generate.refused("a dog", *words)


def test_a_manifest_that_cannot_be_written_is_named(generate):
    Path("outputs/jobs.jsonl").mkdir(parents=True)
    code, _, err = generate("a dog")
    assert code == 1
    assert "jobs.jsonl" in err
    assert "make room" not in err
