"""Pictures made on the way."""

from __future__ import annotations

import hashlib

from PIL import Image


def pictures(run, step):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((run.samples / f"{step:06d}").iterdir())
    }


def test_pictures_of_the_subject_and_of_its_class(training):
    run = training.train("rex", "--steps", "4", "--sample-every", "2", "--lr", "1e-2")
    found = pictures(run, 2)
    assert list(found) == ["class-0.png", "class-1.png", "instance-0.png", "instance-1.png"]
    assert len(set(found.values())) == 4
    assert not set(pictures(run, 4).values()) & set(found.values()), "the model has learnt something"
    with Image.open(run.samples / "000002" / "class-0.png") as picture:
        assert (picture.size, picture.mode) == ((32, 32), "RGB")


def test_of_the_same_weights_they_are_the_same(training, interrupted):
    from dbcap import runs
    from dbcap.runs import Run

    words = ["--steps", "3", "--sample-every", "3", "--method", "embedding", "--lr", "1"]
    straight = training.train("rex", *words)
    expected = pictures(straight, 3)
    runs.remove(straight)
    interrupted(1, *training.words("rex", *words))
    training.resume("rex")
    assert pictures(Run(runs.folder() / "rex"), 3) == expected


def test_guidance_changes_them(training):
    words = ["--steps", "1", "--sample-every", "1"]
    with_it, without = (training.train(f"g{one}", *words, "--sample-guidance", one) for one in ("7.5", "1"))
    assert not set(pictures(with_it, 1).values()) & set(pictures(without, 1).values())


def test_where_there_is_no_class_there_are_none_of_it(training, tiny_dataset, tmp_path):
    import shutil
    from dataclasses import replace

    from dbcap.dataset import manifest

    data = shutil.copytree(tiny_dataset, tmp_path / "dog")
    replace(manifest.read(data), class_word=None, classes=None).write()
    run = training.train("rex", "--steps", "1", "--sample-every", "1", data=data)
    assert list(pictures(run, 1)) == ["instance-0.png", "instance-1.png"]
