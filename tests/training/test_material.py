"""What a run shows, as the data set is now."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dbcap.config.models import CommonConfig
from dbcap.config.paths import cache_dir
from dbcap.config.training import TrainConfig
from dbcap.dataset import class_images, manifest
from dbcap.errors import DbcapError, UsageError
from dbcap.events import Silent
from dbcap.files import sha256_of
from dbcap.models.hub import locate
from dbcap.runs import Run
from dbcap.training import material

COMMON = CommonConfig(offline=True)


@pytest.fixture
def data(tiny_dataset, tmp_path):
    """A data set that may be changed."""
    return shutil.copytree(tiny_dataset, tmp_path / "dog")


@pytest.fixture
def run(tmp_path):
    found = Run(tmp_path / "run")
    found.folder.mkdir()
    return found


@pytest.fixture
def gathered(home, run, tiny_diffusion):
    """Return a function that gives what a run shows, and its own data set."""

    def call(data, told=None, words=("", "a photo of a dog"), **settings):
        config = TrainConfig(data=(str(data),), **settings)
        own = material.data_set(run, config, COMMON, told or Silent())
        local = locate(str(tiny_diffusion), kind="diffusion", offline=True, events=Silent(), home=cache_dir())
        classes = class_images.ensure(own, local, "cpu", COMMON, Silent())
        return material.gather(own, classes, words, local, config, "cpu", Silent()), own, classes

    return call


def test_what_is_shown(gathered, data):
    found, own, classes = gathered(data)
    assert own.folder.name == "dataset"
    assert [len(one.views) for one in found.photos] == [3, 2, 1]
    assert [len(one.views) for one in found.held_out] == [1, 1, 1]
    assert [len(one.views) for one in found.classes] == [1, 1]
    assert found.captions == ("a photo of a sks dog", "a sks dog on a table", "a photo of a dog", "")
    assert [one.caption for one in (*found.photos, *found.held_out, *found.classes)] == [0, 1, 0, 0, 1, 0, 2, 2]
    assert found.photos[0].views[0].mean.shape == (4, 8, 8)
    assert len(classes) == 2


def test_mirrored_photos_and_never_mirrored_class_images(gathered, data):
    found, _, _ = gathered(data, flip=True)
    assert [len(one.views) for one in found.photos] == [6, 4, 2]
    assert [len(one.views) for one in (*found.held_out, *found.classes)] == [1] * 5


def test_captions_that_were_edited_in_the_data_set_count(gathered, data, told):
    rows = [
        {"file_name": "0.png", "text": "[V] the {class} on grass"},
        {"file_name": "1.png", "text": "a sks dog on a table"},
        {"file_name": "2.png", "text": "a pond"},
    ]
    (data / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, own, _ = gathered(data, told)
    assert [photo.caption for photo in own.photos] == ["sks the dog on grass", "a sks dog on a table", "a pond"]
    assert [photo.source for photo in own.photos] == ["written", "template", "written"]
    assert told.warned == ["2.png: its caption holds neither [V] nor sks"]


def test_a_picture_that_was_edited_counts(gathered, data, run):
    before, _, _ = gathered(data)
    shutil.rmtree(run.folder / "dataset")
    values = np.random.default_rng(5).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(values).save(data / "train" / "0.png")
    found, own, classes = gathered(data)
    assert [len(one.views) for one in found.photos] == [1, 2, 1]
    assert not found.photos[0].views[0].mean.equal(before.photos[0].views[0].mean)
    assert found.photos[2].views[0].mean.equal(before.photos[2].views[0].mean)
    facts = material.facts(own, classes)
    assert facts["photos"]["0.png"] == sha256_of(data / "train" / "0.png")


def test_a_picture_that_is_gone_is_named(gathered, data, run):
    (data / "train" / "1.png").unlink()
    with pytest.raises(DbcapError) as failure:
        gathered(data)
    assert str(failure.value) == f"{data / 'train' / '1.png'} is missing; `dbcap prep` makes it again"
    assert not (run.folder / "dataset").exists()


def test_half_a_copy_of_a_command_that_was_killed_is_made_again(gathered, data, run):
    (run.folder / ".dataset.tmp" / "train").mkdir(parents=True)
    (run.folder / ".dataset.tmp" / "train" / "9.png").write_bytes(b"half")
    _, own, _ = gathered(data)
    assert sorted(path.name for path in (own.folder / "train").iterdir()) == ["0.png", "1.png", "2.png"]
    assert not (run.folder / ".dataset.tmp").exists()


def test_what_has_changed_is_named(run):
    before = {"photos": {"a": "1"}, "captions": ["x"], "class_images": ["2"]}
    assert material.check(before, {**before}, run) is None
    for name, words in (("photos", "photos"), ("captions", "captions"), ("class_images", "class images")):
        with pytest.raises(UsageError, match=f"^the {words} of the run run have changed since it began; put them back"):
            material.check(before, {**before, name: []}, run)


def test_another_autoencoder_has_latents_of_its_own(tiny_diffusion, home, tmp_path, family):
    where = {"kind": "diffusion", "offline": True, "events": Silent(), "home": cache_dir()}
    local = locate(str(tiny_diffusion), **where)
    again = shutil.copytree(tiny_diffusion, tmp_path / "copy")
    config = again / "vae" / "config.json"
    assert material._vae_sha256(locate(str(again), **where)) == material._vae_sha256(local)
    config.write_text(config.read_text().replace("0.18215", "0.2"))
    assert material._vae_sha256(locate(str(again), **where)) != material._vae_sha256(local)
    path = tmp_path / "one.safetensors"
    family(tiny_diffusion).write_single_file(path)
    assert len(material._vae_sha256(locate(str(path), **where))) == 64


def test_without_a_prior_class_images_are_not_looked_for(training, data):
    own = replace(manifest.read(data), classes=replace(manifest.read(data).classes, folder="/nowhere"))
    own.write()
    run = training.train("rex", "--steps", "1", "--prior", "none", data=data)
    assert run.read()["data"]["class_images"] == []
