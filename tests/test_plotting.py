"""The picture of a run: what is drawn where, and what it is drawn over."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dbcap import plotting
from dbcap.plotting import BLUE, GREEN, ORANGE, WIDTH, Chart, Curve, Plot, draw, is_plot, smooth, thinned, ticks, write

NUMBERS = st.floats(-1e6, 1e6)


def plot(*charts, pictures=None):
    return Plot("dog-1", "finished", charts, pictures or {})


def count(image, colour):
    """Return how many pixels are of a colour exactly."""
    return int((np.array(image) == colour).all(-1).sum())


# ---- numbers


@given(st.lists(NUMBERS, min_size=1, max_size=300))
def test_smooth_stays_within_the_values_and_keeps_their_number(values):
    found = smooth(np.array(values))
    assert found.shape == (len(values),)
    room = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - room <= found.min() <= found.max() <= max(values) + room


def test_smooth_by_hand():
    assert smooth(np.full(500, 3.0)) == pytest.approx(np.full(500, 3.0))
    line = np.arange(500.0)
    assert smooth(line)[100:400] == pytest.approx(line[100:400])  # away from its ends a line stays one
    near, far = math.exp(-0.5), math.exp(-2)
    assert smooth(np.array([1.0, 0, 0]))[0] == pytest.approx(1 / (1 + near + far))
    noise = np.random.default_rng(0).normal(size=4000)
    assert smooth(noise).std() < 0.1 < 0.9 < noise.std()


@given(NUMBERS, st.floats(1e-6, 1e6), st.integers(3, 12))
def test_ticks_are_round_even_and_inside(low, width, most):
    high = low + width
    found = ticks(low, high, most)
    assert len(found) <= most + 1
    room = width * 1e-6 + abs(low) * 1e-8
    assert all(low - room <= value <= high + room for value in found)
    gaps = np.diff(found)
    if len(gaps):
        assert gaps == pytest.approx(np.full(len(gaps), gaps[0]), rel=1e-3, abs=room)


def test_ticks_by_hand():
    assert ticks(0, 800, 8) == [0, 100, 200, 300, 400, 500, 600, 700, 800]
    assert ticks(0.09, 0.24, 4) == [0.1, 0.15, 0.2]
    assert ticks(0, 1, 8) == [0, 0.2, 0.4, 0.6, 0.8, 1]


@given(st.lists(st.integers(0, 10**6), unique=True, min_size=1, max_size=50).map(sorted), st.integers(2, 9))
def test_thinned_keeps_both_ends_and_the_order(numbers, most):
    found = thinned(numbers, most)
    assert len(found) == min(len(numbers), most)
    assert found == sorted(set(found))
    assert {found[0], found[-1]} == {numbers[0], numbers[-1]}


# ---- drawing


def test_a_curve_is_light_points_and_a_strong_line():
    random = np.random.default_rng(0)
    points = [(step, float(value)) for step, value in enumerate(random.lognormal(-2, 1, 400), 1)]
    image = draw(plot(Chart("loss", [Curve("instance", BLUE, points)])))
    assert image.width == WIDTH
    light = tuple(255 - (255 - one) * 3 // 10 for one in BLUE)
    assert count(image, light) > 1000
    assert 1000 < count(image, BLUE) < 6000
    assert count(image, ORANGE) == count(image, GREEN) == 0


def test_a_higher_value_is_further_up_and_a_later_step_further_right():
    low, high = (
        draw(plot(Chart("loss", [Curve("a", BLUE, [(1, 1.0), (9, value)], every=True)]))) for value in (0.5, 2.0)
    )
    for image, rises in ((low, False), (high, True)):
        blue = (np.array(image)[150:] == BLUE).all(-1)  # below the legend
        columns = np.flatnonzero(blue.any(0))
        left, right = (np.flatnonzero(blue[:, column]).mean() for column in (columns[5], columns[-5]))
        assert (right < left) == rises


def test_the_best_is_marked_where_it_is():
    curve = Curve("total", BLUE, [(step, 1 + abs(step - 300) / 1000) for step in range(100, 900, 100)], every=True)
    without, image = (draw(plot(Chart("loss", [curve], mark))) for mark in (None, (300, 1.0)))
    assert count(without, GREEN) == 0
    columns = np.flatnonzero((np.array(image) == GREEN).all(-1).any(0))
    assert columns.min() < 96 + (WIDTH - 96 - 40) * 300 / 800 < columns.max()


def test_one_value_zeros_and_outliers_have_a_place():
    for points in ([(1, 0.5)], [(0, 0.5)], [(1, 0.0), (2, 0.0)], [(1, 1e-9), (2, 1e9)]):
        for every in (False, True):
            image = draw(plot(Chart("loss", [Curve("instance", BLUE, points, every)])))
            assert count(image, BLUE) > 100, (points, every)
    few = [(step, 0.1 if step != 50 else 1e6) for step in range(1, 1001)]
    image = draw(plot(Chart("loss", [Curve("instance", BLUE, few), Curve("class", ORANGE, [])])))
    assert count(image, ORANGE) == 0, "a curve without points is not in the legend"


def test_a_chart_without_points_is_left_out():
    one = Chart("loss", [Curve("instance", BLUE, [(1, 0.5)])])
    assert (
        draw(plot(one, Chart("validation", [Curve("total", GREEN, [], every=True)]))).height == draw(plot(one)).height
    )


# ---- pictures


@pytest.fixture
def sampled(tmp_path):
    """Return a function that writes pictures of one colour."""

    def call(name, colour, size=(64, 64)):
        path = tmp_path / name
        Image.new("RGB", size, colour).save(path)
        return path

    return call


def test_pictures_stand_by_step_and_line(sampled):
    red, blue = sampled("red.png", "red"), sampled("blue.png", "blue", (64, 32))
    image = draw(plot(pictures={"instance-0": {100: red, 200: red}, "class-0": {200: blue}}))
    found = np.array(image)
    reds, blues = ((found == colour).all(-1) for colour in ((255, 0, 0), (0, 0, 255)))
    assert reds.sum() == 2 * 160 * 160
    assert blues.sum() == 160 * 80, "a picture keeps its shape"
    assert np.flatnonzero(reds.any(1)).max() < np.flatnonzero(blues.any(1)).min()
    assert np.flatnonzero(blues.any(0)).min() > np.flatnonzero(reds.any(0)).min() + 160


def test_many_steps_and_lines_are_thinned(sampled):
    red = sampled("red.png", "red")
    many = {f"instance-{line}": dict.fromkeys(range(0, 5000, 50), red) for line in range(30)}
    image = draw(plot(pictures=many))
    reds = (np.array(image) == (255, 0, 0)).all(-1)
    columns, lines = (int((np.diff(reds.any(axis).astype(int)) == 1).sum()) for axis in (0, 1))
    assert (columns, lines) == (8, 8)
    assert image.height < 1500


def test_what_is_no_picture_leaves_its_place_empty(sampled, tmp_path):
    red = sampled("red.png", "red")
    (tmp_path / "cut.png").write_bytes(red.read_bytes()[:-40])
    (tmp_path / "text.png").write_text("no picture")
    broken = {100: tmp_path / "cut.png", 200: tmp_path / "text.png", 300: tmp_path / "gone.png", 400: red}
    reds = (np.array(draw(plot(pictures={"instance-0": broken}))) == (255, 0, 0)).all(-1)
    assert reds.sum() == 160 * 160


# ---- files


def test_a_plot_is_known_again_and_nothing_else_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(plot(Chart("loss", [Curve("instance", BLUE, [(1, 0.5)])])), Path("plot.png"))
    with Image.open("plot.png") as image:
        assert (image.format, image.width) == ("PNG", WIDTH)
    Image.new("RGB", (4, 4)).save("photo.png")
    Path("text.png").write_text("dbcap plot")
    Path("folder.png").mkdir()
    os.mkfifo("pipe.png")
    names = ["plot.png", "photo.png", "text.png", "folder.png", "pipe.png", "absent.png"]
    assert [is_plot(Path(name)) for name in names] == [True, *[False] * 5]


def test_a_plot_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "plot.png"
    write(plot(), path)
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        write(plot(Chart("loss", [Curve("instance", BLUE, [(1, 0.5)])])), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["plot.png"]
    assert plotting.is_plot(path)
