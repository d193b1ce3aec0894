"""Class images: made once, only what is missing, the same to the bit."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dbcap.config.models import CommonConfig
from dbcap.dataset import class_images
from dbcap.dataset.class_images import ensure
from dbcap.dataset.manifest import ClassSettings, DataSet
from dbcap.errors import DbcapError, Interrupted
from dbcap.events import Silent
from dbcap.files import Lock, sha256_of
from dbcap.generation.gallery import Gallery
from dbcap.generation.pictures import facts_of

PROMPTS = ("a photo of a dog", "a small dog in snow")


@pytest.fixture
def made(located, tiny_diffusion):
    """Return a function that gives the class images of a data set with so many of them."""
    local = located(tiny_diffusion)

    def call(count, events=None, **settings):
        how = {"prompts": PROMPTS, "guidance": 1.0, "steps": 2, "folder": None, **settings}
        data = DataSet(
            Path("unused"), str(tiny_diffusion), None, 32, "center", "sks", "dog", (), ClassSettings(count, **how)
        )
        return ensure(data, local, "cpu", CommonConfig(), events or Silent())

    return call


def jobs_in(folder):
    return [json.loads(line)["job"] for line in (folder / "jobs.jsonl").read_text().splitlines()]


def test_what_is_missing_is_made_and_as_if_it_were_made_at_once(made, told, home, capfd):
    heard = told()
    first = made(3, heard)
    assert heard.announced == [3 * 2]
    (line,) = heard.said
    assert line.startswith("making 3 images of the class with ")
    folder = first[0].path.parent
    assert folder.parent == home / "class-images"
    again = told()
    assert made(3, again) == first
    assert (again.said, again.announced) == ([], [])
    assert made(2) == first[:2]
    more = told()
    all_of_them = made(18, more)  # more than a batch
    assert more.announced == [15 * 2]
    assert all_of_them[:3] == first
    assert len({one.sha256 for one in all_of_them}) == 18
    shutil.move(folder, home / "before")
    assert made(18) == all_of_them, "cold"
    for number in (0, 5, 17):
        all_of_them[number].path.unlink()
    assert made(18) == all_of_them, "half warm"
    assert capfd.readouterr().out == ""


def test_each_has_its_prompt_and_seed(made):
    found = made(5)
    assert [one.caption for one in found] == [PROMPTS[number % 2] for number in range(5)]
    jobs = jobs_in(found[0].path.parent)
    assert [(job["seed"], job["prompt"]) for job in jobs] == [(number, PROMPTS[number % 2]) for number in range(5)]
    assert {(job["scheduler"], job["steps"], job["guidance"], job["width"]) for job in jobs} == {("model", 2, 1.0, 32)}
    for number, one in enumerate(found):
        assert one.sha256 == sha256_of(one.path)
        assert facts_of(one.path)["job"]["seed"] == number


@pytest.mark.parametrize("other", [{"prompts": PROMPTS[:1]}, {"guidance": 2.0}, {"steps": 3}])
def test_other_settings_have_a_folder_of_their_own(made, other):
    usual, others = made(1), made(1, **other)
    assert usual[0].path.parent != others[0].path.parent
    assert len(jobs_in(usual[0].path.parent)) == 1
    assert usual[0].sha256 != others[0].sha256 or "prompts" in other


def test_none_are_wanted(made, tiny_diffusion, located, home):
    data = DataSet(Path("unused"), "m", None, 32, "center", "sks", None, (), None)
    assert ensure(data, located(tiny_diffusion), "cpu", CommonConfig(), Silent()) == ()
    assert made(0) == ()
    assert not (home / "class-images").exists()


def test_two_at_once_make_each_once(made, told):
    found = {}
    heard = [told(), told()]
    threads = [
        threading.Thread(target=lambda number=number: found.update({number: made(4, heard[number])}))
        for number in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert sorted(len(one.announced) for one in heard) == [0, 1], "one makes them, the other waits"
    assert len(jobs_in(found[0][0].path.parent)) == 4


def test_who_makes_them_elsewhere_is_waited_for(made, told):
    folder = made(1)[0].path.parent
    found = []
    waits = threading.Event()

    class Waiting(told):
        def say(self, message):
            super().say(message)
            waits.set()

    heard = Waiting()
    with Lock(folder.with_name(f".{folder.name}.lock")):
        thread = threading.Thread(target=lambda: found.append(made(2, heard)))
        thread.start()
        assert waits.wait(30)
        assert heard.said == ["another dbcap is making these class images: waiting for it"]
        assert found == []
    thread.join()
    assert len(found[0]) == 2


def test_what_is_there_needs_no_lock(made):
    first = made(2)
    folder = first[0].path.parent
    with Lock(folder.with_name(f".{folder.name}.lock")), Lock(folder / ".dbcap.lock"):
        assert made(2) == first


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interrupted])
def test_an_interruption_keeps_what_is_made(made, told, monkeypatch, error):
    whole = made(20)
    folder = whole[0].path.parent
    shutil.rmtree(folder)
    real, count = Gallery.write, 0

    def write(self, *arguments):
        nonlocal count
        count += 1
        if count == 18:
            raise error
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Gallery, "write", write)
        with pytest.raises(Interrupted) as stopped:
            made(20)
    assert stopped.value.state == "17 of 20 are made; the same command goes on"
    heard = told()
    assert made(20, heard) == whole
    assert heard.announced == [3 * 2]


def test_images_that_cannot_be_made_are_an_error(made, monkeypatch):
    def write(*_):
        raise DbcapError("cannot write x: No space left on device", "make room")

    monkeypatch.setattr(Gallery, "write", write)
    with pytest.raises(DbcapError) as failed:
        made(1)
    assert failed.value.message == "cannot write x: No space left on device"


def test_images_that_vanish_meanwhile_are_an_error(made, monkeypatch):
    made(2)
    real = class_images.run.make

    def make(*arguments):
        report = real(*arguments)
        shutil.rmtree(arguments[0].out)
        return report

    monkeypatch.setattr(class_images.run, "make", make)
    with pytest.raises(DbcapError) as failed:
        made(3)
    assert "have gone" in failed.value.message


# ---- own photos


def test_own_photos_are_brought_to_size_in_the_order_of_their_names(made, photos, home):
    (photos / "notes.txt").write_text("no picture")
    found = made(100, folder=str(photos))
    assert [one.caption for one in found] == ["a photo of a dog"] * 3
    originals = [sha256_of(photos / f"{number}.png") for number in range(3)]
    assert [one.path.stem for one in found] == originals
    for one in found:
        assert one.path.is_relative_to(home)
        assert Image.open(one.path).size == (32, 32)
        assert one.sha256 == sha256_of(one.path)
    times = [os.stat(one.path).st_mtime_ns for one in found]
    assert made(100, folder=str(photos)) == found
    assert [os.stat(one.path).st_mtime_ns for one in found] == times


def test_own_photos_that_cannot_be_read_are_left_out(made, told, photos):
    (photos / "0.png").write_bytes(b"x")
    heard = told()
    found = made(100, heard, folder=str(photos))
    assert len(found) == 2
    assert heard.failed == [f"{photos}/0.png: is no image that dbcap can read"]
    for path in photos.iterdir():
        path.write_bytes(b"x")
    with pytest.raises(DbcapError) as failed:
        made(100, folder=str(photos))
    assert failed.value.message == f"none of the photos in {photos} can be read"


def test_the_size_and_crop_of_own_photos_are_the_data_sets(located, tiny_diffusion, photos):
    local = located(tiny_diffusion)
    classes = ClassSettings(1, PROMPTS, 1.0, 2, str(photos))
    for crop, size in (("none", (43, 32)), ("pad", (32, 32)), ("center", (32, 32))):
        data = DataSet(Path("unused"), "m", None, 32, crop, "sks", "owl", (), classes)
        found = ensure(data, local, "cpu", CommonConfig(), Silent())
        assert Image.open(found[0].path).size == size
        assert found[0].caption == "a photo of an owl"
    assert np.asarray(Image.open(found[0].path)).std() > 0


# ---- killed

PROGRAM = """
import sys
from pathlib import Path
from dbcap.config.models import CommonConfig
from dbcap.config.paths import cache_dir
from dbcap.dataset.class_images import ensure
from dbcap.dataset.manifest import ClassSettings, DataSet
from dbcap.events import Silent
from dbcap.models.hub import locate
model = sys.argv[1]
local = locate(model, kind="diffusion", offline=True, events=Silent(), home=cache_dir())
classes = ClassSettings(40, ("a photo of a dog", "a small dog in snow"), 1.0, 2)
data = DataSet(Path("unused"), model, None, 32, "center", "sks", "dog", (), classes)
ensure(data, local, "cpu", CommonConfig(), Silent())
"""


def test_a_killed_process_leaves_what_it_made(made, told, home, tiny_diffusion):
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # which files of images name
    command = [sys.executable, "-c", PROGRAM, str(tiny_diffusion)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)
    while len(list(home.glob("class-images/*/*.png"))) < 5:
        assert child.poll() is None, child.stderr.read()
    child.kill()
    child.communicate()
    kept = len(list(home.glob("class-images/*/*.png")))
    heard = told()
    found = made(40, heard)
    missing = ([(40 - kept) * 2], [(40 - kept + 1) * 2])  # the last file may have come without its line
    assert heard.announced in missing or (kept == 40 and heard.announced == [])  # on a busy machine it may be done
    shutil.rmtree(found[0].path.parent)
    assert made(40) == found
