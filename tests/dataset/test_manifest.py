"""`dataset.json`."""

import dataclasses
import json
import os

import pytest

from dbcap.dataset import manifest
from dbcap.dataset.manifest import ClassSettings, DataSet, Photo
from dbcap.errors import DbcapError

PHOTO = Photo("a.png", "ab", "a sks dog", "template", os.fsdecode(b"/photos/\xff.jpg"), "cd", 64, 96)


def data_set(folder, **more):
    classes = ClassSettings(3, ("a dog", "a photo of a dog"), 1.0, 20)
    return DataSet(folder, "starter", None, 64, "none", "sks", "dog", (PHOTO,), classes, ("é",), **more)


def test_what_is_written_is_read(tmp_path):
    data = data_set(tmp_path)
    assert not manifest.is_dataset(tmp_path)
    data.write()
    assert manifest.is_dataset(tmp_path)
    assert manifest.read(tmp_path) == data
    assert data.path_of(PHOTO) == tmp_path / "train" / "a.png"
    plain = dataclasses.replace(data, classes=None, class_word=None, photos=())
    plain.write("other.json")
    assert manifest.read(tmp_path, "other.json") == plain
    assert json.loads((tmp_path / "dataset.json").read_text("utf-8"))["warnings"] == ["é"]


def test_a_data_set_may_be_moved(tmp_path):
    data_set(tmp_path).write()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "dataset.json").rename(tmp_path / "elsewhere" / "dataset.json")
    assert manifest.read(tmp_path / "elsewhere").folder == tmp_path / "elsewhere"


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said.pop("size"),
        lambda said: said.update(format=2),
        lambda said: said.update(more=1),
        lambda said: said["photos"][0].pop("caption"),
        lambda said: said["photos"][0].update(file="../../away.png"),
        lambda said: said["classes"].pop("prompts"),
        lambda said: said.update(warnings=None),
    ],
)
def test_what_is_damaged_is_named(tmp_path, change):
    data_set(tmp_path).write()
    path = tmp_path / "dataset.json"
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))
    with pytest.raises(DbcapError) as refused:
        manifest.read(tmp_path)
    assert refused.value.message.startswith(f"{path} is damaged: ")


def test_a_file_that_is_no_json_is_damaged(tmp_path):
    (tmp_path / "dataset.json").write_bytes(b"{\xff")
    with pytest.raises(DbcapError) as refused:
        manifest.read(tmp_path)
    assert "is damaged" in refused.value.message
