"""Photos brought to size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from dbcap.dataset.crops import cropped

WAYS = ("center", "smart", "pad", "none")


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def wide(width=300, height=100, at=0):
    """A grey picture with noise in a square at this place along its longer side."""
    image = Image.new("RGB", (width, height), "gray")
    side = min(width, height)
    image.paste(noise(side, side), (at, 0) if width > height else (0, at))
    return image


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(WAYS), st.sampled_from([8, 32]))
@settings(max_examples=60)
def test_every_shape_comes_to_size(width, height, how, size):
    image = cropped(noise(width, height), how, size)
    assert image.mode == "RGB"
    if how == "none":
        assert min(image.size) == size
        assert max(image.size) == pytest.approx(size * max(width, height) / min(width, height), abs=0.51)
        # 16x17 comes to 8x8: nearly square ones may become square
        assert image.width == image.height or (image.width > image.height) == (width > height)
    else:
        assert image.size == (size, size)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("size", [(400, 300), (300, 400), (300, 300)])
def test_a_circle_stays_one(how, size):
    image = Image.new("RGB", size, "white")
    x, y = size[0] // 2, size[1] // 2
    ImageDraw.Draw(image).ellipse((x - 100, y - 100, x + 100, y + 100), fill="black")
    black = np.asarray(cropped(image, how, 90).convert("L")) < 128
    across, down = black.any(0).sum(), black.any(1).sum()
    assert across == pytest.approx(down, abs=1)
    shorter = 400 if how == "pad" and size != (300, 300) else 300
    assert across == pytest.approx(200 * 90 / shorter, abs=1)


@pytest.mark.parametrize("at", [0, 40, 133, 200])
@pytest.mark.parametrize("upright", [False, True])
def test_smart_finds_the_detail(at, upright):
    image = wide(100, 300, at) if upright else wide(at=at)
    smart = np.asarray(cropped(image, "smart", 100), int)
    cut = image.crop((0, at, 100, at + 100) if upright else (at, 0, at + 100, 100))
    assert np.abs(smart - np.asarray(cut, int)).mean() < 12, "the square with the noise, give or take a pixel"
    center = np.asarray(cropped(image, "center", 100), int)
    assert (
        center == np.asarray(image, int)[100:200] if upright else center == np.asarray(image, int)[:, 100:200]
    ).all()


def test_of_equal_squares_smart_takes_the_middle_one():
    plain = Image.new("RGB", (300, 100), "gray")
    plain.putpixel((150, 50), (255, 255, 255))
    assert cropped(plain, "smart", 100).tobytes() == cropped(plain, "center", 100).tobytes()


def test_a_large_photo_is_cut_as_a_small_copy_of_it():
    large = wide(3000, 1000, 1700)
    smart = np.asarray(cropped(large, "smart", 100), int)
    there = np.asarray(large.crop((1700, 0, 2700, 1000)).resize((100, 100), Image.Resampling.LANCZOS), int)
    assert np.abs(smart - there).mean() < 12


def test_a_border_is_mirrored_and_blurred_and_leaves_the_photo():
    photo = wide(200, 100, 50)
    padded = np.asarray(cropped(photo, "pad", 200), int)
    assert (padded[50:150] == np.asarray(photo, int)).all()
    top, bottom = padded[:50], padded[150:]
    assert (top == bottom[::-1]).mean() < 0.9, "either side has the edge that it touches"
    assert top.std() < 0.5 * padded[50:150].std()
    assert np.abs(top[-1].mean(0) - 128).max() < 40
    assert (np.asarray(cropped(photo.transpose(Image.Transpose.ROTATE_90), "pad", 200))[:, :50] != 0).any()


def test_a_thin_photo_can_be_padded():
    padded = cropped(noise(1, 400), "pad", 64)
    assert padded.size == (64, 64)
    assert (np.asarray(padded).std(axis=1) < 40).all()
