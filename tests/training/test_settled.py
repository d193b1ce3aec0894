"""From what was asked for to what a run does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbcap.config.training import TrainConfig
from dbcap.dataset.manifest import ClassSettings, DataSet
from dbcap.errors import UsageError
from dbcap.training import settled

CLASSES = ClassSettings(100, ("a photo of a dog",), 1.0, 30)
DATA = DataSet(Path("/data"), "starter", None, 64, "center", "sks", "dog", (), CLASSES)


def config(**settings):
    return TrainConfig(data=("d",), **settings)


@pytest.mark.parametrize(
    ("method", "steps", "lr", "prior"),
    [("full", 800, 2e-6, "images"), ("lora", 800, 1e-4, "images"), ("embedding", 3000, 5e-4, "none")],
)
def test_what_depends_on_the_method(method, steps, lr, prior):
    found = settled.settled(config(method=method))
    assert (found.steps, found.lr, found.prior) == (steps, lr, prior)
    own = settled.settled(config(method=method, steps=7, lr=0.5))
    assert (own.steps, own.lr) == (7, 0.5)


@pytest.mark.parametrize(("warmup", "steps"), [(5, 5), (6, 5), (800, None)])
def test_a_warm_up_without_an_end_is_refused(warmup, steps):
    with pytest.raises(UsageError, match=f"--warmup {warmup} is not shorter than --steps {steps or 800}; choose"):
        settled.settled(config(warmup=warmup, steps=steps))


# ---- learning rates


@pytest.mark.parametrize(
    ("schedule", "parts"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_learning_rates(schedule, parts):
    part = settled.factor(config(lr_schedule=schedule, warmup=2, steps=6))
    assert [part(step) for step in range(6)] == pytest.approx(parts)


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    steps=st.integers(2, 5000),
    data=st.data(),
)
def test_it_rises_and_then_never_rises_again(schedule, steps, data):
    warmup = data.draw(st.integers(0, steps - 1))
    part = settled.factor(config(lr_schedule=schedule, warmup=warmup, steps=steps))
    parts = [part(step) for step in range(steps)]
    assert all(0 < one <= 1 for one in parts), "no step is for nothing"
    assert parts[: warmup + 1] == sorted(parts[: warmup + 1])
    assert parts[warmup:] == sorted(parts[warmup:], reverse=True)
    assert parts[warmup] == 1
    assert part(steps) >= 0


# ---- a data set that is prepared already


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 32}, "with --size 64, and --size 32"),
        ({"crop": "smart"}, "with --crop center, and --crop smart"),
        ({"identifier": "zwx"}, "with --identifier sks, and --identifier zwx"),
        ({"class_word": "cat"}, "with --class-word dog, and --class-word cat"),
        ({"class_images": 50}, "with --class-images 100, and --class-images 50"),
        ({"class_guidance": 3.0}, "with --class-guidance 1.0, and --class-guidance 3.0"),
        ({"class_steps": 9}, "with --class-steps 30, and --class-steps 9"),
        ({"class_dir": "/dogs"}, "without --class-dir, and --class-dir /dogs"),
        ({"caption": True}, "without --caption, and --caption"),
        ({"drop_duplicates": True}, "without --drop-duplicates, and --drop-duplicates"),
        (
            {"class_prompts": ("a {class} runs", "a dog")},
            "with --class-prompts a photo of a dog, and --class-prompts a dog runs, a dog",
        ),
    ],
)
def test_options_that_say_something_else_are_refused(settings, message):
    with pytest.raises(UsageError) as failure:
        settled.of_data(config(**settings), DATA, settings)
    assert str(failure.value) == f"/data was prepared {message} is asked for; run `dbcap prep` again with it"


@pytest.mark.parametrize(
    ("settings", "data"),
    [
        ({}, DATA),
        ({"size": 64, "class_word": "dog", "identifier": "sks", "class_images": 100}, DATA),
        ({"class_images": 110}, replace(DATA, class_word=None, classes=None)),
        ({"class_dir": "/dogs", "class_images": 5}, replace(DATA, classes=replace(CLASSES, folder="/dogs"))),
    ],
)
def test_options_that_say_the_same_or_nothing(settings, data):
    found = settled.of_data(config(**settings), data, settings)
    assert (found.size, found.crop, found.identifier, found.class_word) == (64, "center", "sks", data.class_word)


def test_what_nobody_asked_for_gives_way_to_the_data_set():
    found = settled.of_data(config(size=32, class_images=110, class_prompts=("a cat",), caption=True), DATA, ())
    assert (found.size, found.class_images, found.class_prompts, found.caption) == (
        64,
        100,
        ("a photo of a dog",),
        True,
    )
