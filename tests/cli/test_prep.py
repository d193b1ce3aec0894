"""`dbcap prep` as the shell sees it, with the starter models and a tiny one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dbcap_starter
from dbcap.files import Lock

OWN = ("--class-word", "dog", "--identifier", "sks", "--out", "d")
MIRRORED = "warning: 03.jpg: nearly the same as 02.jpg, mirrored\n"


@pytest.fixture
def photos(project) -> Path:
    """A folder with two photos."""
    folder = project / "photos"
    folder.mkdir()
    for number in range(2):
        values = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def prep(cli, photos, tiny_diffusion):
    """Return a function that prepares them for a tiny model."""

    def call(*words):
        return cli("prep", "photos", *OWN, "--model", str(tiny_diffusion), "--class-steps", "2", *words)

    return call


def class_images(home):
    return sorted(home.glob("class-images/*/*.png"))


def test_the_folder_is_printed_and_the_rest_is_talk(prep, home):
    result = prep("--class-images", "3")
    assert (result.code, result.out) == (0, "d\n")
    lines = result.err.splitlines()
    assert any("identifier sks is a rifle" in line for line in lines)
    assert any(all(word in line for word in ("photo", "size", "caption by", "warnings")) for line in lines)
    assert any(all(word in line for word in ("0.png", "50x40 -> 32x32", "template", "sks dog")) for line in lines)
    assert lines[-1] == "2 photos, 2 written, 3 class images"
    assert len(class_images(home)) == 3
    assert Path("d/dataset.json").is_file()


def test_again_and_with_more_class_images(prep, home):
    prep("--class-images", "2")
    first = {path: path.stat().st_mtime_ns for path in [*class_images(home), *Path("d/train").iterdir()]}
    again = prep("--class-images", "2")
    assert (again.code, again.err.splitlines()[-1]) == (0, "2 photos, none of them new, 2 class images")
    assert "making" not in again.err
    more = prep("--class-images", "5")
    assert "making 3 images of the class with" in more.err
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert len(class_images(home)) == 5


def test_quiet_is_quiet(prep):
    result = prep("--class-images", "0", "--quiet")
    assert (result.code, result.out, result.err) == (0, "d\n", "")


def test_captions_in_the_table_are_safe_to_show(prep, photos):
    (photos / "0.txt").write_text("[bold]sks[/bold] dog\x1b[31m")
    (photos / "1.txt").write_text("a dog, no more")
    result = prep("--class-images", "0")
    assert "\x1b" not in result.err
    assert "[bold]sks[/bold]" in result.err
    assert "warning: 1.png: its caption holds neither [V] nor sks, and is used as it stands\n" in result.err
    assert "you" in result.err
    rows = [json.loads(line) for line in Path("d/train/metadata.jsonl").read_text().splitlines()]
    assert rows[1] == {"file_name": "1.png", "text": "a dog, no more"}


def test_some_photos_fail(prep, photos):
    (photos / "1.png").write_bytes(b"x")
    result = prep("--class-images", "0")
    assert (result.code, result.out) == (3, "d\n")
    assert "failed: photos/1.png: is no image that dbcap can read\n" in result.err
    assert result.err.splitlines()[-1] == "1 photo, 1 written, 1 failed"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["photos"], 2, "--out is missing"),
        (["photos", "--out", "other"], 2, "--out other is not empty, and no data set of dbcap's"),
        (["photos", "--out", "photos"], 2, "--out photos is the folder of photos"),
        (["photos", "--out", "photos/d"], 2, "--out photos/d lies inside the folder of photos"),
        (["other", "--out", "d"], 2, "there are no photos in other"),
        (["photos", "--out", "d", "--crop", "squash"], 2, "--crop"),
        (["photos", "--out", "d", "--size", "33"], 2, "--size 33 is no multiple of 4"),
        (["photos", "--out", "d", "--class-word", "SKS toy", "--identifier", "sks"], 2, "clashes with the class word"),
        (["photos", "--out", "d", "--model", "./nowhere"], 1, "no such folder: ./nowhere"),
    ],
)
def test_what_is_refused_is_one_line_and_touches_nothing(cli, photos, tiny_diffusion, project, words, code, said):
    (project / "other").mkdir()
    (project / "other" / "notes.md").touch()
    before = sorted(project.rglob("*"))
    result = cli(
        "prep", *words, *([] if "--model" in words else ["--model", str(tiny_diffusion)]), "--class-images", "0"
    )
    assert result.code == code
    assert (result.out, said in result.err.splitlines()[-1]) == ("", True)
    assert sorted(project.rglob("*")) == before


def test_a_locked_data_set(prep):
    prep("--class-images", "0")
    with Lock(Path("d/.dbcap.lock")):
        result = prep("--class-images", "0")
    assert (result.code, result.out) == (4, "")
    assert "another dbcap is at work here" in result.err


def test_settings_come_from_a_file(prep):
    Path("dbcap.toml").write_text('[prep]\nclass_images = 0\ntemplate = "[V], my {class}"\ncrop = "none"\n')
    result = prep()
    assert result.code == 0
    assert "sks, my dog" in Path("d/train/metadata.jsonl").read_text()
    assert json.loads(Path("d/dataset.json").read_text())["crop"] == "none"


# ---- the starter models


def test_the_profile_starter_prepares_for_its_models(cli, project, home):
    for name in ("00.png", "01.png"):
        shutil.copyfile(sorted(dbcap_starter.samples().glob("*.png"))[int(name[:2])], name)
    said = json.loads((dbcap_starter.samples() / "metadata.jsonl").read_text().splitlines()[0])["text"]
    assert "birthday cake" in said
    words = ["--profile", "starter", "--class-word", "birthday cake", "--caption", "--class-images", "2", "--out", "d"]
    result = cli("prep", "00.png", "01.png", *words, "--class-steps", "2")
    assert (result.code, result.out) == (0, "d\n")
    data = json.loads(Path("d/dataset.json").read_text())
    one, other = data["photos"]
    word = data["identifier"]
    assert (data["model"], data["size"], data["classes"]["count"]) == ("starter", 64, 2)
    assert one["source"] == other["source"] == "captioner"
    assert one["caption"] == said.replace("birthday cake", f"{word} birthday cake")
    assert other["caption"].startswith(f"{word} birthday cake, ") or f"{word} birthday cake" in other["caption"]
    assert data["classes"]["prompts"][0] == "a 3d render of a birthday cake on a white background"
    assert len(class_images(home)) == 2


def test_the_real_photos(cli, shared):
    result = cli("prep", str(shared / "photos" / "dog5"), "--profile", "starter", *OWN, "--class-images", "0")
    assert (result.code, result.out) == (0, "d\n")
    assert [line for line in result.err.splitlines(True) if "nearly" in line and "warning" in line] == [MIRRORED]
    assert "blurred" not in result.err
    assert "too small" not in result.err
    other = cli("prep", *map(str, shared.glob("photos/*_toy")), "--profile", "starter", "--out", "toys")
    assert (other.code, json.loads(Path("toys/dataset.json").read_text())["warnings"]) == (0, [])
    assert "there is no --class-word: training will have no prior" in other.err
    same = cli(
        "prep",
        str(shared / "photos" / "dog5"),
        "--profile",
        "starter",
        *OWN,
        "--drop-duplicates",
        "--quiet",
        "--class-images",
        "0",
    )
    assert same.code == 0
    assert sorted(path.name for path in Path("d/train").glob("*.png")) == ["00.png", "01.png", "02.png", "04.png"]
