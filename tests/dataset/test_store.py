"""The folder of a data set: what it may be, and what becomes of it when somebody edits it or pulls the plug."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dbcap.dataset import store
from dbcap.dataset.manifest import DataSet, Photo
from dbcap.errors import DbcapError, UsageError
from dbcap.events import Silent

# ---- what it may be


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folders with photos, with a data set, with something else, and with a run that was killed."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "empty", "other", "ours", "begun", "locked"):
        (tmp_path / name).mkdir()
    for name in ("photos/a.jpg", "other/x", "ours/dataset.json", "begun/.dataset.json.next", "locked/.dbcap.lock"):
        (tmp_path / name).touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("photos")
    return tmp_path


@pytest.mark.parametrize("out", ["new", "new/deep", "empty", "ours", "begun", "locked"])
def test_folders_that_may_be_one(places, out):
    assert store.refuse(places / out, ["photos"], ["photos/a.jpg"]) is None


@pytest.mark.parametrize(
    ("out", "folders", "said"),
    [
        ("file", ["photos"], "is no folder"),
        ("other", ["photos"], "is not empty, and no data set of dbcap's"),
        ("photos", ["photos"], "is the folder of photos"),
        ("link", ["photos"], "is the folder of photos"),
        ("photos/new", ["photos"], "lies inside the folder of photos"),
        ("photos/new", ["link"], "lies inside the folder of photos"),
        (".", ["photos"], "holds the folder of photos"),
        ("photos", [], "holds the photo photos/a.jpg"),
        ("photos", ["other"], "holds the photo photos/a.jpg"),
    ],
)
def test_folders_that_may_not(places, out, folders, said):
    before = sorted(os.walk(places))
    with pytest.raises(UsageError) as refused:
        store.refuse(places / out, folders, ["photos/a.jpg"])
    assert said in refused.value.message
    assert sorted(os.walk(places)) == before


# ---- names of files


@pytest.mark.parametrize(
    ("origin", "name"),
    [
        ("/x/a.b.jpg", "a.b.png"),
        ("/x/Ä ö(1).JPG", "Ä ö(1).png"),
        ("/x/a\tb\n.jpg", "a-b.png"),
        (os.fsdecode(b"/x/\xff\xfe.jpg"), "photo.png"),
        ("/x/..jpg.png", "jpg.png"),
        ("/x/" + "é" * 120 + ".jpg", "é" * 50 + ".png"),
    ],
)
def test_names_come_from_photos(origin, name):
    assert store.free_name(origin, ()) == name


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=5), max_size=12))
def test_no_two_have_one_name(stems):
    taken: list[str] = []
    for stem in stems:
        taken.append(store.free_name(f"/x/{stem.replace('/', '')}.jpg", taken))
    assert len({name.casefold() for name in taken}) == len(stems)
    assert all(name == os.path.basename(name) and name.endswith(".png") for name in taken)
    assert all(not name.startswith(".") for name in taken)


# ---- pictures that somebody changed


def image(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8))


def test_a_picture_knows_whether_it_was_edited(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(store.png_of(image()))
    assert store.edited_picture(path) is None
    Image.open(path).save(path, pnginfo=None)
    assert store.edited_picture(path).tobytes() == image().tobytes(), "without our mark it may be anything"
    path.write_bytes(store.png_of(image())[:60])
    assert store.edited_picture(path) is None
    assert store.edited_picture(tmp_path / "none.png") is None
    assert store.png_of(image()) == store.png_of(image())


# ---- replacing a data set


def photo(name, caption, edited=False):
    return Photo(f"{name}.png", "", caption, "template", f"/photos/{name}.jpg", name, 8, 8, edited)


def committed(folder, captions, before=None, edited=()):
    """Make the folder a data set with these captions by name."""
    photos = tuple(photo(name, text, name in edited) for name, text in captions.items())
    data = DataSet(folder, "m", None, 8, "center", "sks", "dog", photos, None)
    pictures = {f"{name}.png": store.png_of(image(len(text))) for name, text in captions.items()}
    return store.commit(data, pictures, before or store.earlier(folder, Silent()))


def captions_in(folder):
    rows = map(json.loads, (folder / "train" / "metadata.jsonl").read_text("utf-8").splitlines())
    return {row["file_name"]: row["text"] for row in rows}


def test_what_is_as_it_should_be_is_not_touched(tmp_path):
    assert committed(tmp_path, {"a": "one", "b": "three"}) == (2, 0)
    assert captions_in(tmp_path) == {"a.png": "one", "b.png": "three"}
    for path in (tmp_path / "train").iterdir():
        os.utime(path, (1, 1))
    (tmp_path / "train" / "own.png").touch()
    assert committed(tmp_path, {"b": "three", "c": "two"}) == (1, 1)
    assert sorted(os.listdir(tmp_path)) == ["dataset.json", "train"]
    times = {path.name: os.stat(path).st_mtime == 1 for path in (tmp_path / "train").iterdir()}
    assert times == {"b.png": True, "c.png": False, "metadata.jsonl": False, "own.png": False}


def test_what_others_put_into_rows_is_kept(tmp_path):
    committed(tmp_path, {"a": "one"})
    table = tmp_path / "train" / "metadata.jsonl"
    table.write_bytes(b'\xef\xbb\xbf{"tags": ["x"], "file_name": "a.png", "text": "one"}\r\n\r\n')
    before = store.earlier(tmp_path, Silent())
    assert before.edited == {}
    committed(tmp_path, {"a": "two"}, before)
    assert json.loads(table.read_text()) == {"tags": ["x"], "file_name": "a.png", "text": "two"}


def test_captions_that_were_edited_are_known_and_stay_so(tmp_path):
    committed(tmp_path, {"a": "one", "b": "two", "c": "three"})
    table = tmp_path / "train" / "metadata.jsonl"
    table.write_text(table.read_text().replace('"one"', '"mine"').replace('"two"', '""'))
    before = store.earlier(tmp_path, Silent())
    assert before.edited == {"a.png": "mine"}
    committed(tmp_path, {"a": "mine", "b": "two", "c": "three"}, before, edited=("a",))
    assert store.earlier(tmp_path, Silent()).edited == {"a.png": "mine"}
    table.write_text(table.read_text().replace('"mine"', '" "'))
    assert store.earlier(tmp_path, Silent()).edited == {}


@pytest.mark.parametrize("line", ["no json", "[1]", '{"text": "x"}', '{"file_name": "a.png", "text": 3}'])
def test_a_damaged_table_is_not_replaced(tmp_path, line):
    committed(tmp_path, {"a": "one"})
    table = tmp_path / "train" / "metadata.jsonl"
    table.write_text(table.read_text() + f"{line}\n")
    with pytest.raises(DbcapError) as refused:
        store.earlier(tmp_path, Silent())
    assert refused.value.message == f"{table}, line 2: no row of file_name and text"


def test_a_photo_is_found_by_its_path_and_where_it_was_moved_by_its_content(tmp_path):
    committed(tmp_path, {"a": "one", "b": "two"})
    before = store.earlier(tmp_path, Silent())
    assert before.of("/photos/a.jpg", "changed", {"/photos/a.jpg"}).file == "a.png"
    assert before.of("/moved/x.jpg", "b", {"/moved/x.jpg"}).file == "b.png"
    assert before.of("/moved/x.jpg", "b", {"/moved/x.jpg", "/photos/b.jpg"}) is None
    assert before.of("/photos/c.jpg", "c", ()) is None


class Plug(Exception):
    pass


def test_whenever_the_plug_is_pulled_it_can_be_run_again(tmp_path, monkeypatch):
    """Every rename and removal in turn fails; no caption is then taken for one that somebody wrote."""
    first, second = {"a": "one", "b": "two", "e": "x"}, {"a": "other", "c": "three", "e": "x"}
    whole = tmp_path / "whole"
    committed(whole, first)
    committed(whole, second)
    expected = {path.name: path.read_bytes() for path in (whole / "train").iterdir()}
    pulled = 0
    for number in range(100):
        folder = tmp_path / str(number)
        committed(folder, first)
        left = number

        def or_pull(real):
            def call(*arguments, **keywords):
                nonlocal left
                left -= 1
                if left < 0:
                    raise Plug
                return real(*arguments, **keywords)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", or_pull(os.replace))
            patch.setattr("pathlib.Path.unlink", or_pull(type(folder).unlink))
            try:
                committed(folder, second)
            except Plug:
                pulled += 1
            else:
                break
        assert store.refuse(folder, [], []) is None
        before = store.earlier(folder, Silent())
        assert before.edited == {}
        committed(folder, second, before)
        assert {path.name: path.read_bytes() for path in (folder / "train").iterdir()} == expected
        assert not (folder / store.NEXT).exists()
    assert pulled == 6, "the next state, two pictures, the table, one that goes, the new name"


def test_a_first_run_that_was_killed_is_ours(tmp_path, monkeypatch):
    out = tmp_path / "out"

    def stop(*_):
        raise Plug

    with monkeypatch.context() as patch:
        patch.setattr(store, "put", stop)
        with pytest.raises(Plug):
            committed(out, {"a": "one"})
    assert store.refuse(out, [], []) is None
    assert committed(out, {"b": "two"}) == (1, 0)
    assert captions_in(out) == {"b.png": "two"}
