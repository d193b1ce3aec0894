"""Near-duplicates, blur, size and shape, on real photos and on drawn ones."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

import dbcap_starter
from dbcap import images
from dbcap.dataset.checks import BLURRED, doubts, near, prints_of, sharpness

SUBJECTS = ("dog5", "duck_toy", "robot_toy")


@pytest.fixture(scope="module")
def photos(shared):
    """The real photos at 480 pixels, by subject and name: what is measured hardly depends on their size."""
    found = {}
    for subject in SUBJECTS:
        for path in sorted((shared / "photos" / subject).glob("*.jpg")):
            image = images.read(path).image
            image.thumbnail((480, 480), Image.Resampling.LANCZOS)
            found[subject, path.stem] = image
    return found


def saved_again(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=15)
    return Image.open(buffer).convert("RGB")


SAME = {
    "saved again": saved_again,
    "small": lambda image: image.resize((image.width // 4, image.height // 4)),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.85),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "cut": lambda image: image.crop((9, 9, image.width - 9, image.height - 9)),
    "squashed": lambda image: image.resize((image.width, image.height * 9 // 10)),
    "turned": lambda image: image.rotate(2, fillcolor=(128, 128, 128)),
}


@pytest.mark.parametrize("change", SAME)
@pytest.mark.parametrize("mirrored", [False, True])
def test_changed_copies_are_near(photos, change, mirrored):
    for image in photos.values():
        copy = SAME[change](ImageOps.mirror(image) if mirrored else image)
        assert near(prints_of(copy), [prints_of(image)]) == (0, mirrored)


def test_the_mirrored_pair_is_the_only_one(photos):
    prints = {name: prints_of(image) for name, image in photos.items()}
    found = {}
    for number, (name, one) in enumerate(prints.items()):
        if twin := near(one, list(prints.values())[:number]):
            found[name] = (list(prints)[twin[0]], twin[1])
    assert found == {("dog5", "03"): (("dog5", "02"), True)}


def test_equal_drawings_on_other_grounds_are_others():
    samples = [Image.open(path).convert("RGB") for path in sorted(dbcap_starter.samples().glob("*.png"))]
    prints = [prints_of(image) for image in samples]
    assert [near(one, prints[:number]) for number, one in enumerate(prints)] == [None] * len(prints)


def test_plain_pictures_are_told_apart_by_their_colour():
    red, also, blue = (prints_of(Image.new("RGB", (50, 50), colour)) for colour in ("#d00000", "#d80000", "#0000d0"))
    assert near(red, [also]) == (0, False)
    assert near(red, [blue]) is None


def test_blur(photos):
    sharp = {name: sharpness(image) for name, image in photos.items()}
    assert min(sharp.values()) > 1.3 * BLURRED
    for image in photos.values():
        blurred = image.filter(ImageFilter.GaussianBlur(2 * min(image.size) / 512))
        assert doubts(blurred, 256, "center") == ["blurred"]
        assert doubts(image, 256, "center") == []


def test_contrast_does_not_change_sharpness(photos):
    image = photos["dog5", "00"]
    pale = ImageEnhance.Contrast(image).enhance(0.5)
    assert sharpness(pale) == pytest.approx(sharpness(image), rel=0.1)


def test_an_empty_picture_is_blurred():
    assert doubts(Image.new("RGB", (40, 40), "white"), 32, "center") == ["blurred"]


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(
    ("width", "height", "crop", "said"),
    [
        (64, 64, "center", []),
        (63, 100, "center", ["too small: 63x100 is scaled up to 64"]),
        (63, 100, "pad", []),
        (40, 50, "pad", ["too small: 40x50 is scaled up to 64"]),
        (64, 128, "smart", []),
        (64, 129, "smart", ["extreme shape, 64x129: most of it is cut off"]),
        (129, 64, "pad", ["extreme shape, 129x64: most of it becomes border"]),
        (129, 64, "none", ["extreme shape, 129x64: training sees a part at a time"]),
        (1, 1, "center", ["too small: 1x1 is scaled up to 64", "blurred"]),
    ],
)
def test_size_and_shape(width, height, crop, said):
    assert doubts(noise(width, height), 64, crop) == said
