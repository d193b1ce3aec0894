"""Photos made into a data set, and made anew into the same one."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dbcap.config.models import CommonConfig, PrepConfig
from dbcap.dataset import manifest
from dbcap.dataset.prepare import prepare
from dbcap.errors import DbcapError, LockHeldError, UsageError
from dbcap.files import Lock, sha256_of


@pytest.fixture
def prep(home, tiny_diffusion, photos, told, tmp_path):
    """Return a function that prepares these photos for a tiny model; it gives the report, and what was told with it."""

    def call(*inputs, out=tmp_path / "out", **settings):
        names = [str(name) for name in inputs or [photos]]
        how = {"identifier": "sks", "class_word": "dog", "model": str(tiny_diffusion), **settings}
        config = PrepConfig(photos=tuple(names), out=str(out), **how)
        call.told = told()
        return prepare(config, names, Path(out), CommonConfig(offline=True), call.told)

    return call


def captions(report):
    return [one.caption for one in report.dataset.photos]


def table(report):
    lines = (report.dataset.folder / "train" / "metadata.jsonl").read_text("utf-8").splitlines()
    return {row["file_name"]: row["text"] for row in map(json.loads, lines)}


def state(folder):
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*.*"))}


# ---- what comes of photos


def test_a_data_set(prep, photos, tiny_diffusion):
    report = prep()
    data = report.dataset
    assert (report.exit_code, report.summary) == (0, "3 photos, 3 written")
    assert sorted(os.listdir(data.folder)) == ["dataset.json", "train"]
    assert sorted(os.listdir(data.folder / "train")) == ["0.png", "1.png", "2.png", "metadata.jsonl"]
    assert table(report) == dict.fromkeys(["0.png", "1.png", "2.png"], "a photo of sks dog")
    assert (data.model, data.size, data.crop, data.identifier, data.class_word) == (
        str(tiny_diffusion), 32, "center", "sks", "dog",
    )  # fmt: skip
    assert data.classes == manifest.ClassSettings(100, ("a photo of a dog",), 1.0, 30)
    assert manifest.read(data.folder) == data
    for number, one in enumerate(data.photos):
        path = data.path_of(one)
        image = Image.open(path)
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
        assert one.sha256 == sha256_of(path)
        assert (one.source, one.edited) == ("template", False)
        assert (one.origin, one.origin_sha256) == (str(photos / f"{number}.png"), sha256_of(photos / f"{number}.png"))
    assert [one.size for one in report.photos] == [(80, 60), (60, 80), (64, 64)]
    assert report.local.revision


def test_without_a_crop_the_longer_side_stays(prep):
    report = prep(crop="none", size=48)
    assert [(one.width, one.height) for one in report.dataset.photos] == [(64, 48), (48, 64), (48, 48)]


def test_names_are_unique_and_the_user_is_told_what_is_wrong(prep, photos, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.open(photos / "0.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other / "0.jpg")
    Image.new("RGB", (200, 20), "red").save(other / "flat.bmp")
    report = prep(photos, other)
    assert [one.file for one in report.dataset.photos] == ["0.png", "1.png", "2.png", "0-2.png", "flat.png"]
    assert prep.told.warned[1:] == [
        "0.jpg: nearly the same as 0.png, mirrored",
        "flat.bmp: too small: 200x20 is scaled up to 32",
        "flat.bmp: extreme shape, 200x20: most of it is cut off",
        "flat.bmp: blurred",
    ]
    assert prep.told.warned[0].startswith("the identifier sks is a rifle")
    assert list(report.dataset.warnings) == prep.told.warned
    assert report.photos[3].warnings == ("nearly the same as 0.png, mirrored",)
    again = prep(photos, other, drop_duplicates=True)
    assert again.summary == "4 photos, 1 removed, 1 left out as duplicates"
    assert "left out 0.jpg: nearly the same as 0.png, mirrored" in prep.told.said
    assert not (again.dataset.folder / "train" / "0-2.png").exists()


def test_photos_that_cannot_be_read_are_left_out(prep, photos):
    (photos / "1.png").write_bytes((photos / "1.png").read_bytes()[:500])
    report = prep(photos, photos / "gone.jpg", "https://example.org/x.jpg")
    assert (report.exit_code, report.summary) == (3, "2 photos, 2 written, 3 failed")
    assert [line.split(";")[0] for line in prep.told.failed] == [
        f"{photos}/1.png: is truncated: the PNG data ends too early",
        f"no such file: {photos}/gone.jpg",
        "https://example.org/x.jpg: is a URL, and photos are files",
    ]
    assert sorted(table(report)) == ["0.png", "2.png"]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"class_word": None}, "there is no --class-word"),
        ({"class_images": 0}, "--class-images is 0"),
    ],
)
def test_where_there_will_be_no_prior_that_is_said_in_one_line(prep, settings, why):
    report = prep(**settings)
    assert report.dataset.classes is None
    assert prep.told.said == [f"{why}: training will have no prior, and may forget other things of the subject's kind"]
    word = " dog" if settings.get("class_word", "dog") else ""
    assert captions(report) == [f"a photo of sks{word}"] * 3


def test_own_photos_of_the_class(prep, photos, tmp_path):
    report = prep(class_dir=str(photos), out=tmp_path / "beside")
    assert report.dataset.classes.folder == str(photos)
    assert not (tmp_path / "home").exists()


# ---- captions


def test_captions_that_somebody_wrote_win(prep, photos):
    (photos / "0.txt").write_bytes(b"\xef\xbb\xbfa [V] {class} on grass\r\n\r\nin an {class} house\r\n")
    (photos / "1.caption").write_bytes(b"a caf\xe9")
    (photos / "2.txt").write_text("\n")
    report = prep()
    assert captions(report) == ["a sks dog on grass, in a dog house", "a café", "a photo of sks dog"]
    assert [one.source for one in report.dataset.photos] == ["written", "written", "template"]
    assert prep.told.warned[1:] == [
        f"{photos}/1.caption is no UTF-8: it was read as cp1252",
        "1.png: its caption holds neither [V] nor sks, and is used as it stands",
    ]
    (photos / "2.txt").write_text("SKS, asleep")
    report = prep()
    assert captions(report)[2] == "SKS, asleep"
    assert report.photos[2].warnings == ()


def test_the_captioner_describes_the_others(prep, photos, tiny_captioner):
    (photos / "1.txt").write_text("a sks dog at sea")
    report = prep(caption=True, captioner=str(tiny_captioner), class_word="cat")
    assert [one.source for one in report.dataset.photos] == ["captioner", "written", "captioner"]
    assert captions(report)[1] == "a sks dog at sea"
    for number in (0, 2):
        text = captions(report)[number]
        assert text.count("sks") == 1
        assert len(text.split()) > 3
    assert prep(caption=True, captioner=str(tiny_captioner), class_word="cat").written == 0
    assert captions(prep()) == ["a photo of sks dog", "a sks dog at sea", "a photo of sks dog"]


def test_the_template_names_the_subject(prep):
    assert set(captions(prep(template="an {class}, [V]"))) == {"a dog, sks"}
    with pytest.raises(UsageError) as refused:
        prep(template="a photo of a {class}")
    assert refused.value.message == "--template 'a photo of a {class}' does not name the subject"


# ---- again


def test_again_nothing_is_written(prep):
    report = prep()
    before = state(report.dataset.folder / "train")
    again = prep()
    assert again.summary == "3 photos, none of them new"
    assert state(report.dataset.folder / "train") == before
    assert dataclasses.replace(again, written=3) == report


def test_photos_come_and_go(prep, photos, tmp_path):
    report = prep()
    kept = state(report.dataset.folder / "train")
    (photos / "1.png").unlink()
    Image.linear_gradient("L").convert("RGB").save(photos / "3.png")
    again = prep()
    assert again.summary == "3 photos, 1 written, 1 removed"
    assert sorted(table(again)) == ["0.png", "2.png", "3.png"]
    now = state(report.dataset.folder / "train")
    assert all(now[name] == kept[name] for name in now if name.endswith(("0.png", "2.png")))
    photos.rename(tmp_path / "moved")
    moved = prep(tmp_path / "moved")
    assert moved.written == 0
    assert [one.file for one in moved.dataset.photos] == ["0.png", "2.png", "3.png"]
    assert moved.dataset.photos[0].origin == str(tmp_path / "moved" / "0.png")


def test_a_photo_that_changed_keeps_its_name(prep, photos):
    prep()
    Image.open(photos / "2.png").rotate(90).save(photos / "2.png")
    report = prep()
    assert report.written == 1
    assert sorted(table(report)) == ["0.png", "1.png", "2.png"]


def test_captions_edited_in_the_data_set_stay(prep, photos):
    report = prep()
    path = report.dataset.folder / "train" / "metadata.jsonl"
    path.write_text(path.read_text().replace("a photo of sks dog", "a [V] {class} I know", 1))
    (photos / "0.txt").write_text("sks, beside the photo")
    for _ in range(3):
        report = prep(template="[V] again")
        assert captions(report) == ["a sks dog I know", "sks again", "sks again"]
        assert [(one.source, one.edited) for one in report.dataset.photos] == [
            ("written", True), ("template", False), ("template", False),
        ]  # fmt: skip
    path.write_text(path.read_text().replace("a sks dog I know", ""))
    assert captions(prep())[0] == "sks, beside the photo"
    path.write_text(path.read_text().replace("sks, beside the photo", "mine again"))
    (photos / "0.png").unlink()
    prep()
    assert "with 0.png goes its caption: mine again" in prep.told.said


def test_pictures_edited_in_the_data_set_stay(prep):
    report = prep()
    path = report.dataset.path_of(report.dataset.photos[0])
    Image.new("RGB", (32, 40), "red").save(path)
    again = prep(crop="pad")
    one = again.dataset.photos[0]
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)
    assert (one.sha256, one.width, one.height, again.written) == (sha256_of(path), 32, 40, 1)
    assert f"{path} was edited, and stays as it is: without it, it is made anew" in prep.told.said
    path.unlink()
    assert prep(crop="pad").written == 1


def test_files_of_the_users_own_are_left_alone(prep, photos):
    report = prep()
    own = report.dataset.folder / "train" / "new.png"
    own.write_bytes(b"mine")
    Image.new("RGB", (40, 40)).save(photos / "new.jpg")
    again = prep()
    assert again.dataset.photos[3].file == "new-2.png"
    assert own.read_bytes() == b"mine"


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": 30}, "--size 30 is no multiple of 4"),
        ({"identifier": "hotdog"}, "--identifier hotdog clashes with the class word dog"),
        ({"class_word": " "}, "--class-word ' ' is no word"),
        ({"class_word": None, "class_dir": "x"}, "--class-dir needs --class-word"),
        ({"class_dir": "nowhere"}, "--class-dir: there is no folder nowhere"),
        ({"class_prompts": ("dog",)}, "--class-prompts dog: there is no such file"),
    ],
)
def test_wrong_settings_leave_nothing(prep, settings, said, tmp_path):
    with pytest.raises(UsageError) as refused:
        prep(**settings)
    assert refused.value.message.startswith(said)
    assert not (tmp_path / "out").exists()


def test_places_that_are_no_data_set_are_left_as_they_are(prep, photos):
    before = state(photos)
    for out, said in ((photos, "is the folder of photos"), (photos / "new", "lies inside the folder of photos")):
        with pytest.raises(UsageError) as refused:
            prep(out=out)
        assert said in refused.value.message
    assert state(photos) == before


def test_no_photos_at_all(prep, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError) as refused:
        prep(tmp_path / "empty")
    assert refused.value.message == f"there are no photos in {tmp_path}/empty"
    for path in photos.iterdir():
        path.write_bytes(b"x")
    with pytest.raises(DbcapError) as failed:
        prep()
    assert (failed.value.exit_code, failed.value.message) == (1, "none of 3 photos can be read")
    assert len(prep.told.failed) == 3
    assert not (tmp_path / "out").exists()


def test_a_data_set_is_not_lost_when_its_photos_cannot_be_read(prep, photos):
    report = prep()
    before = state(report.dataset.folder)
    for path in photos.iterdir():
        path.write_bytes(b"x")
    with pytest.raises(DbcapError):
        prep()
    assert state(report.dataset.folder) == before


def test_one_at_a_time(prep, tmp_path):
    with Lock(tmp_path / "out" / ".dbcap.lock"):
        with pytest.raises(LockHeldError) as refused:
            prep()
        assert refused.value.exit_code == 4
    assert prep().written == 3


# ---- killed


def test_a_killed_run_is_simply_run_again(prep, photos, tmp_path, tiny_diffusion):
    for number in range(3, 60):
        values = np.random.default_rng(number).integers(0, 256, (200, 200, 3), np.uint8)
        Image.fromarray(values).save(photos / f"{number}.png")
    whole = prep(out=tmp_path / "whole", crop="none", size=200)
    words = ["prep", str(photos), "--out", str(tmp_path / "out"), "--class-word", "dog", "--identifier", "sks"]
    words += ["--model", str(tiny_diffusion), "--crop", "none", "--size", "200", "--class-images", "0"]
    child = subprocess.Popen([sys.executable, "-m", "dbcap", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    until = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("train/*.png"))) < 3:
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < until
    child.kill()
    child.communicate()
    assert not (tmp_path / "out" / "dataset.json").exists()
    again = prep(crop="none", size=200)
    assert again.written < 60
    assert [dataclasses.replace(one, origin="") for one in again.dataset.photos] == [
        dataclasses.replace(one, origin="") for one in whole.dataset.photos
    ]
    assert all(one.sha256 == sha256_of(again.dataset.path_of(one)) for one in again.dataset.photos)
