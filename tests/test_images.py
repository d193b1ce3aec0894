from __future__ import annotations

import builtins
import contextlib
import errno
import hashlib
import io
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import tracemalloc
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from dbcap import images
from dbcap.errors import InputError, UsageError

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(mode: str, colour: object, size: tuple[int, int] = (4, 3)) -> Image.Image:
    return Image.new(mode, size, colour)  # type: ignore[arg-type]


def pixel(data: bytes, at: tuple[int, int] = (0, 0), **options: object) -> tuple[int, int, int]:
    picture = images.read_bytes(data, **options)  # type: ignore[arg-type]
    assert picture.image.mode == "RGB"
    return picture.image.getpixel(at)  # type: ignore[return-value]


def near(one: tuple[int, ...], other: tuple[int, ...], tolerance: int = 3) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(one, other, strict=True))


def problem(data: bytes, **options: object) -> InputError:
    with pytest.raises(InputError) as caught:
        images.read_bytes(data, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return caught.value


def noise(size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.effect_noise(size, 80).convert("RGB")


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Fail when anything, C libraries included, writes to file 2, or when Python would print a warning."""
    with tempfile.TemporaryFile() as file, warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        assert file.read() == b""


# ---- what comes out


def test_picture_is_plain_and_hashed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(plain("RGB", RED), "PNG", exif=exif, icc_profile=srgb_profile())
    picture = images.read_bytes(data)
    assert (picture.width, picture.height) == picture.image.size == (3, 4)
    assert picture.sha256 == hashlib.sha256(data).hexdigest()
    assert type(picture.image) is Image.Image
    assert picture.image.info == {}
    # What is saved from it must not carry the old profile or the old rotation.
    again = Image.open(io.BytesIO(encoded(picture.image, "PNG")))
    assert "icc_profile" not in again.info
    assert again.getexif().get(0x0112) is None


def test_pixels_equal_pillows_own() -> None:
    data = encoded(noise(), "JPEG")
    assert images.read_bytes(data).image.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


SCENE = (8, 6)


def turned(orientation: int, row: int, column: int) -> tuple[int, int]:
    """Return the x, y of the upright scene that is stored at a row and column (EXIF 2.3, tag 0x0112)."""
    right, bottom = SCENE[0] - 1, SCENE[1] - 1
    return {
        1: (column, row),
        2: (right - column, row),
        3: (right - column, bottom - row),
        4: (column, bottom - row),
        5: (row, column),
        6: (right - row, column),
        7: (right - row, bottom - column),
        8: (row, bottom - column),
    }[orientation]


def scene_pixel(x: int, y: int) -> tuple[int, int, int]:
    return ((RED, GREEN), (BLUE, WHITE))[y >= SCENE[1] // 2][x >= SCENE[0] // 2]


def stored(orientation: int, scale: int = 1) -> Image.Image:
    w, h = SCENE
    size = (w, h) if orientation < 5 else (h, w)
    image = Image.new("RGB", size)
    for c in range(size[0]):
        for r in range(size[1]):
            image.putpixel((c, r), scene_pixel(*turned(orientation, r, c)))
    return image.resize((size[0] * scale, size[1] * scale), Image.Resampling.NEAREST)


def assert_upright(image: Image.Image, scale: int, tolerance: int) -> None:
    w, h = SCENE
    assert image.size == (w * scale, h * scale)
    for x in range(w):
        for y in range(h):
            got = image.getpixel((x * scale + scale // 2, y * scale + scale // 2))
            assert near(got, scene_pixel(x, y), tolerance), (x, y, got)  # type: ignore[arg-type]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options", "scale", "tolerance"),
    [
        ("PNG", {}, 1, 0),
        ("TIFF", {}, 1, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 1, 0),
        ("WEBP", {"lossless": True}, 1, 0),
        ("JPEG", {"quality": 95}, 16, 25),
        ("AVIF", {"quality": 95}, 16, 25),
    ],
    ids=["png", "tiff", "tiff-lzw", "webp", "jpeg", "avif"],
)
def test_every_orientation(orientation: int, kind: str, options: dict[str, object], scale: int, tolerance: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored(orientation, scale), kind, exif=exif, **options)
    assert_upright(images.read_bytes(data).image, scale, tolerance)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_is_turned_once(orientation: int) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = orientation
    # Given as bytes it also becomes a rotation of the container, as cameras write it: both say the same turn.
    data = encoded(stored(orientation, 16), "HEIF", exif=exif.tobytes(), quality=95)
    assert_upright(images.read_bytes(data).image, 16, 40)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_impossible_orientation_is_none(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert images.read_bytes(encoded(plain("RGB", RED), "PNG", exif=exif)).image.size == (4, 3)


# ---- modes


def test_grey_palette_bilevel_and_colour_spaces() -> None:
    assert pixel(encoded(plain("L", 77), "PNG")) == (77, 77, 77)
    assert pixel(encoded(plain("1", 1), "PNG")) == WHITE
    assert pixel(encoded(plain("1", 0), "TIFF", compression="group4")) == BLACK
    palette = plain("P", 3)
    palette.putpalette([0, 0, 0, 1, 1, 1, 2, 2, 2, 10, 200, 30])
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        assert pixel(encoded(palette, kind)) == (10, 200, 30)
    assert near(pixel(encoded(plain("YCbCr", (76, 85, 255)), "TIFF")), RED)
    assert near(pixel(encoded(plain("RGB", RED).convert("LAB"), "TIFF")), RED, 6)
    assert near(pixel(encoded(plain("HSV", (85, 255, 255)).convert("RGB"), "PNG")), GREEN)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])  # Pillow writes CMYK JPEG as Adobe does, inverted
def test_cmyk(kind: str) -> None:
    assert near(pixel(encoded(plain("CMYK", (255, 0, 0, 0), (16, 16)), kind)), (0, 255, 255))
    assert near(pixel(encoded(plain("CMYK", (0, 0, 0, 255), (16, 16)), kind)), BLACK)
    assert near(pixel(encoded(plain("CMYK", (0, 0, 0, 0), (16, 16)), kind)), WHITE)


@pytest.mark.parametrize(
    ("value", "level"), [(0, 0), (128, 0), (129, 1), (257, 1), (32768, 128), (40000, 156), (65535, 255)]
)
def test_16_bit_grey_is_scaled_not_clipped(value: int, level: int) -> None:
    deep = Image.frombytes("I;16", (2, 1), struct.pack("<2H", value, value))
    for kind in ("PNG", "TIFF"):
        assert pixel(encoded(deep, kind)) == (level,) * 3
    assert pixel(b"P5 2 1 65535\n" + struct.pack(">2H", value, value)) == (level,) * 3
    big_endian = Image.frombytes("I;16B", (2, 1), struct.pack(">2H", value, value))
    assert pixel(encoded(big_endian, "TIFF")) == (level,) * 3


def png(depth: int, colour: int, row: bytes, extra: bytes = b"", size: tuple[int, int] = (1, 1)) -> bytes:
    """Write a PNG by hand whose every row is `row`."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    body = zlib.compress((b"\0" + row) * size[1])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def test_16_bit_colour_png() -> None:
    assert near(pixel(png(16, 2, struct.pack(">3H", 65535, 32896, 0))), (255, 128, 0), 1)
    half = pixel(png(16, 6, struct.pack(">4H", 65535, 0, 0, 32896)), alpha="black")
    assert near(half, (128, 0, 0), 1)
    assert near(pixel(png(16, 4, struct.pack(">2H", 0, 32896))), (127, 127, 127), 1)


def test_integers_beyond_16_bits_are_stretched() -> None:
    image = Image.new("I", (3, 1))
    for x, value in enumerate((-100_000, 0, 100_000)):
        image.putpixel((x, 0), value)
    data = encoded(image, "TIFF")
    assert [pixel(data, (x, 0))[0] for x in range(3)] == [0, 128, 255]


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        ((0.0, 0.5, 1.0), [0, 128, 255]),
        ((0.1, 0.2, 0.25), [26, 51, 64]),
        ((0.0, 100.0, 255.0), [0, 100, 255]),
        ((-2.0, 0.0, 2.0), [0, 128, 255]),
        ((0.0, 500.0, 1000.0), [0, 128, 255]),
        ((float("nan"), 0.5, 1.0), [0, 128, 255]),
        ((0.5, float("inf"), float("-inf")), [128, 255, 0]),
        ((7000.0, 7000.0, 7000.0), [0, 0, 0]),
    ],
)
def test_floats(values: tuple[float, ...], levels: list[int]) -> None:
    data = encoded(Image.frombytes("F", (3, 1), struct.pack("<3f", *values)), "TIFF")
    assert [pixel(data, (x, 0))[0] for x in range(3)] == levels


def test_animation_gives_first_frame_and_tiff_first_page() -> None:
    first, second = plain("RGB", RED, (16, 16)), plain("RGB", BLUE, (16, 16))
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("AVIF", {})):
        data = encoded(first, kind, save_all=True, append_images=[second], **options)
        assert near(pixel(data), RED), kind
    assert near(pixel(encoded(first, "MPO", save_all=True, append_images=[second])), RED)


# ---- alpha


def test_alpha_is_composited() -> None:
    half = plain("RGBA", (255, 0, 0, 128))
    assert pixel(encoded(half, "PNG")) == (255, 127, 127)
    assert pixel(encoded(half, "PNG"), alpha="black") == (128, 0, 0)
    assert pixel(encoded(half, "WEBP", lossless=True), alpha="#0000FF") == (128, 0, 127)
    assert pixel(encoded(plain("RGBA", (9, 9, 9, 0)), "PNG"), alpha="#102030") == (16, 32, 48)
    assert pixel(encoded(plain("RGBA", (9, 8, 7, 255)), "PNG")) == (9, 8, 7)
    assert pixel(encoded(plain("LA", (100, 128)), "PNG"), alpha="black") == (50, 50, 50)
    assert pixel(encoded(plain("RGBA", (9, 9, 9, 0), (16, 16)), "ICO"), alpha="#102030") == (16, 32, 48)


@pytest.mark.parametrize("transparency", [1, b"\xff\x00", b"\xff\x80"])
def test_palette_with_transparency(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    data = encoded(image, "PNG", transparency=transparency)
    assert pixel(data, (0, 0), alpha="black") == RED
    assert pixel(data, (1, 0), alpha="black") == ((0, 128, 0) if transparency == b"\xff\x80" else BLACK)
    if isinstance(transparency, int):
        assert pixel(encoded(image, "GIF", transparency=1), (1, 0), alpha="#0000ff") == BLUE


@pytest.mark.parametrize(
    ("depth", "colour", "row", "key", "width"),
    [
        (1, 0, bytes([0b01000000]), struct.pack(">H", 1), 2),
        (2, 0, bytes([0b00100000]), struct.pack(">H", 2), 2),
        (4, 0, bytes([0x05]), struct.pack(">H", 5), 2),
        (8, 0, bytes([0, 200]), struct.pack(">H", 200), 2),
        (16, 0, struct.pack(">2H", 0, 1000), struct.pack(">H", 1000), 2),
        (8, 2, bytes([0, 0, 0, 7, 8, 9]), struct.pack(">3H", 7, 8, 9), 2),
        (16, 2, struct.pack(">6H", 0, 0, 0, 0x1234, 0x5678, 0x9ABC), struct.pack(">3H", 0x1234, 0x5678, 0x9ABC), 2),
    ],
)
def test_png_colour_key_at_every_depth(depth: int, colour: int, row: bytes, key: bytes, width: int) -> None:
    data = png(depth, colour, row, chunk(b"tRNS", key), (width, 1))
    assert pixel(data, (0, 0), alpha="#00ff00") == BLACK
    assert pixel(data, (1, 0), alpha="#00ff00") == GREEN


def test_unused_colour_key_changes_nothing() -> None:
    data = png(8, 0, bytes([10, 200]), chunk(b"tRNS", struct.pack(">H", 60000)), (2, 1))
    assert pixel(data, (1, 0)) == (200, 200, 200)


@pytest.mark.parametrize("text", ["white", "WHITE", "#ffffff", "#FfFfFf"])
def test_parse_colour(text: str) -> None:
    assert images.parse_colour(text) == WHITE
    assert images.parse_colour("Black") == BLACK
    assert images.parse_colour("#0a0B0c") == (10, 11, 12)


@pytest.mark.parametrize("text", ["", "red", "#fff", "ffffff", "#ffffff0", "#gggggg", "#ffffff\n", " white"])
def test_parse_colour_names_what_is_allowed(text: str) -> None:
    with pytest.raises(UsageError, match="white, black or #rrggbb"):
        images.parse_colour(text)


# ---- colour profiles


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped_profile() -> bytes:
    """Return an RGB profile in which red and blue have changed places."""
    return srgb_profile().replace(b"rXYZ", b"tmp ").replace(b"bXYZ", b"rXYZ").replace(b"tmp ", b"bXYZ")


def written_profile(space: bytes, pcs: bytes, tags: dict[bytes, bytes], device: bytes = b"prtr") -> bytes:
    table, body, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += name + struct.pack(">II", at + len(body), len(content))
        body += content
    header = struct.pack(">I4sI4s4s4s", at + len(body), b"lcms", 0x02400000, device, space, pcs)
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28
    header += struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    return header.ljust(128, b"\0") + table + body


def linear_grey_profile() -> bytes:
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    return written_profile(b"GRAY", b"XYZ ", {b"wtpt": white, b"kTRC": b"curv" + b"\0" * 8}, b"mntr")


def inverse_cmyk_profile() -> bytes:
    """Return a profile for a press whose black ink is white: no ink is black."""
    ramp = bytes(range(256))
    table = b"".join(bytes([255 if k else 0, 128, 128]) for _ in range(8) for k in (0, 1))
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + table + ramp * 3
    return written_profile(b"CMYK", b"Lab ", {b"A2B0": lut})


def test_rgb_profile_is_applied() -> None:
    red = plain("RGB", RED, (16, 16))
    for kind in ("PNG", "TIFF", "JPEG"):
        assert near(pixel(encoded(red, kind, icc_profile=swapped_profile())), BLUE), kind
    assert near(pixel(encoded(red, "WEBP", lossless=True, icc_profile=swapped_profile())), BLUE)
    assert near(pixel(encoded(red, "AVIF", icc_profile=swapped_profile())), BLUE, 8)
    palette = red.quantize(2)
    assert near(pixel(encoded(palette, "PNG", icc_profile=swapped_profile())), BLUE)


def test_profile_before_alpha_which_is_kept() -> None:
    data = encoded(plain("RGBA", (255, 0, 0, 128)), "PNG", icc_profile=swapped_profile())
    assert near(pixel(data, alpha="black"), (0, 0, 128))
    assert near(pixel(data, alpha="#ff0000"), (127, 0, 128))  # the background is sRGB: not converted


def test_srgb_in_other_words_keeps_every_pixel() -> None:
    image = Image.merge("RGB", [noise().getchannel(0) for _ in range(3)])
    red = b"XYZ \0\0\0\0" + struct.pack(">i", 0x6FA0)  # the X of red, 0.4360
    assert red in srgb_profile()
    nearly = srgb_profile().replace(red, red[:8] + struct.pack(">i", 0x6FA0 + 12))
    for profile in (srgb_profile(), nearly):
        data = encoded(image, "PNG", icc_profile=profile)
        assert images.read_bytes(data).image.tobytes() == image.tobytes()


def test_grey_and_cmyk_profiles() -> None:
    assert near(pixel(encoded(plain("L", 55), "PNG", icc_profile=linear_grey_profile())), (128,) * 3)
    assert near(pixel(encoded(plain("LA", (55, 255)), "PNG", icc_profile=linear_grey_profile())), (128,) * 3)
    deep = png(
        16, 4, struct.pack(">2H", 55 * 257, 65535), chunk(b"iCCP", b"x\0\0" + zlib.compress(linear_grey_profile()))
    )
    assert near(pixel(deep), (128,) * 3)
    for kind in ("TIFF", "JPEG"):
        cmyk = plain("CMYK", (0, 0, 0, 0), (16, 16))
        assert near(pixel(encoded(cmyk, kind, icc_profile=inverse_cmyk_profile())), BLACK), kind
        cmyk = plain("CMYK", (0, 0, 0, 255), (16, 16))
        assert near(pixel(encoded(cmyk, kind, icc_profile=inverse_cmyk_profile())), WHITE), kind


def test_grey_picture_with_colour_profile() -> None:
    linear = srgb_profile().replace(b"para\0\0\0\0\0\x03\0\0", b"curv\0\0\0\0\0\0\0\0")
    assert near(pixel(encoded(plain("L", 55), "PNG", icc_profile=linear)), (128,) * 3)
    assert pixel(encoded(plain("L", 77), "PNG", icc_profile=srgb_profile())) == (77, 77, 77)


@pytest.mark.parametrize(
    "profile",
    [b"", b"rubbish", b"\0" * 200, srgb_profile()[:300], linear_grey_profile(), inverse_cmyk_profile()],
    ids=["empty", "rubbish", "zeros", "cut", "grey", "cmyk"],
)
def test_unusable_profile_is_ignored(profile: bytes) -> None:
    with silent_stderr():
        for kind in ("PNG", "TIFF", "WEBP", "JPEG"):
            data = encoded(plain("RGB", (200, 100, 50), (16, 16)), kind, icc_profile=profile)
            assert near(pixel(data), (200, 100, 50), 6), kind


# ---- broken metadata is no reason to fail


def with_app(jpeg: bytes, marker: int, body: bytes) -> bytes:
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def test_broken_exif() -> None:
    jpeg = encoded(plain("RGB", RED, (16, 16)), "JPEG")
    with silent_stderr():
        for body in (
            b"Exif\0\0",
            b"Exif\0\0rubbish",
            b"Exif\0\0II*\0\xff\xff\xff\xff",
            b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 9,
        ):
            assert near(pixel(with_app(jpeg, 0xE1, body)), RED)
        assert pixel(png(8, 2, bytes(RED), chunk(b"eXIf", b"rubbish"))) == RED
        assert pixel(png(8, 2, bytes(RED), chunk(b"tEXt", b"Raw profile type exif\0\nexif\n3\nzz"))) == RED
        bad_sum = chunk(b"eXIf", b"II*\0\x08\0\0\0\0\0")[:-4] + b"oops"
        assert pixel(png(8, 2, bytes(RED), bad_sum)) == RED


def test_profile_block_that_pillow_cannot_parse() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = encoded(plain("RGB", RED, (16, 32)), "JPEG", exif=exif)
    with silent_stderr():
        data = with_app(jpeg, 0xE2, b"ICC_PROFILE\0")
        assert near(pixel(data), RED)
        assert images.read_bytes(data).image.size == (32, 16)  # EXIF still counts
        for body in (b"", b"x", b"x\0\x09abc", b"x\0\0rubbish", b"x\0\0" + zlib.compress(b"\0" * 40_000_000)):
            assert pixel(png(8, 2, bytes(RED), chunk(b"iCCP", body))) == RED
        assert pixel(png(8, 2, bytes(RED), chunk(b"iCCP", b"x\0\0")[:-4] + b"oops")) == RED


def test_text_bomb_in_png() -> None:
    bomb = chunk(b"zTXt", b"key\0\0" + zlib.compress(b"x" * 80_000_000))
    error = problem(png(8, 2, bytes(RED), bomb))
    assert error.kind == "too-large"
    many = chunk(b"zTXt", b"key\0\0" + zlib.compress(b"x" * 1_000_000)) * 70
    assert problem(png(8, 2, bytes(RED), many)).kind == "too-large"


# ---- bad inputs


def test_empty_and_foreign() -> None:
    assert problem(b"").kind == "empty"
    for data in (b"hello, this is a text\nnamed .png\n", b"\0" * 5000, os.urandom(3) + b"\x17" * 300):
        error = problem(data)
        assert (error.kind, error.message) == ("not-an-image", "is no image that dbcap can read")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_truncated_is_an_error(kind: str) -> None:
    data = encoded(noise((120, 90)), kind)
    for part in (0.3, 0.6, 0.95):
        error = problem(data[: int(len(data) * part)])
        assert error.kind in ("truncated", "damaged")
        if kind != "TIFF":  # its directory, at the end, is what is missing first
            assert error.kind == "truncated", (part, error)


def test_progressive_jpeg_truncated() -> None:
    data = encoded(noise((120, 90)), "JPEG", progressive=True)
    assert problem(data[: len(data) * 3 // 4]).kind == "truncated"


def test_only_a_header_is_damaged_not_foreign() -> None:
    for kind, size in (("JPEG", 40), ("PNG", 20)):
        error = problem(encoded(noise(), kind)[:size])
        assert error.kind in ("truncated", "damaged")
        assert kind in error.message


def refused_files() -> dict[str, bytes]:
    eps = encoded(plain("RGB", RED), "EPS")
    return {
        "eps": eps,
        "dos-eps": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(eps)) + b"\0" * 20 + eps,
        "pdf": encoded(plain("RGB", RED), "PDF"),
        "wmf": b"\xd7\xcd\xc6\x9a" + b"\0" * 60,
        "emf": b"\x01\0\0\0" + b"\0" * 36 + b" EMF" + b"\0" * 60,
        "mpeg": b"\0\0\x01\xb3\x16\x01\x20\x13" + b"\0" * 60,
        "fits": b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800),
        "hdf5": b"\x89HDF\r\n\x1a\n" + b"\0" * 60,
        "grib": b"GRIB\0\0\0\x01" + b"\0" * 60,
        "bufr": b"BUFR" + b"\0" * 60,
        "mp4": b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + b"\0" * 60,
        "jxl": b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0" * 60,
    }


@pytest.mark.parametrize("name", refused_files())
def test_refused_formats(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a program"))
    error = problem(refused_files()[name])
    assert error.kind == "unsupported"
    assert "convert it" in error.hint


def test_eps_inside_iptc_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a program"))
    eps = encoded(plain("RGB", RED), "EPS")[:30000]
    fields = [(3, 60, b"\x03\x01"), (3, 65, b"\x01"), (3, 120, b"\x01"), (3, 20, b"\0\x04"), (3, 30, b"\0\x03")]
    data = b"".join(struct.pack(">BBBH", 0x1C, *tag, len(body)) + body for *tag, body in fields)
    assert problem(data + struct.pack(">BBBH", 0x1C, 8, 10, len(eps)) + eps).kind == "not-an-image"


# ---- bombs


def claiming(side: int) -> bytes:
    """Return a PNG whose header claims side x side pixels, with hardly any data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def test_bomb_is_refused_by_its_header() -> None:
    with silent_stderr():
        tracemalloc.start()
        error = problem(claiming(20_000))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert error.kind == "too-large"
    assert str(error) == "has 400,000,000 pixels; the limit is 178,956,970; raise --max-pixels if you trust it"
    assert peak < 1_000_000


def test_real_bomb_and_both_sides_of_the_limit() -> None:
    data = png(1, 0, b"\0" * 250, size=(2000, 2000))
    assert len(data) < 5000
    assert problem(data, max_pixels=3_999_999).kind == "too-large"
    assert images.read_bytes(data, max_pixels=4_000_000).image.size == (2000, 2000)


def test_pillows_own_limit_is_not_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    data = encoded(noise(), "PNG")
    with silent_stderr():
        assert images.read_bytes(data).image.size == (64, 48)
    with pytest.raises(Image.DecompressionBombError):  # who is not reading through us keeps Pillow's guard
        Image.open(io.BytesIO(data))


def test_larger_limit_lets_a_large_claim_through() -> None:
    assert problem(claiming(20_000), max_pixels=400_000_000).kind == "truncated"


def icon(content: bytes, kind: str) -> bytes:
    if kind == "ico":
        return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(content), 22) + content
    return b"icns" + struct.pack(">I", 16 + len(content)) + b"ic10" + struct.pack(">I", 8 + len(content)) + content


@pytest.mark.parametrize("kind", ["ico", "icns"])
def test_bomb_inside_an_icon(kind: str) -> None:
    tracemalloc.start()
    error = problem(icon(claiming(20_000), kind))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.kind == "too-large", error
    assert peak < 10_000_000
    with silent_stderr():
        assert images.read_bytes(icon(encoded(plain("RGB", RED, (1024, 1024)), "PNG"), kind)).width == 1024


def test_bomb_in_frames_beyond_the_screen() -> None:
    gif = bytearray(encoded(plain("P", 0, (8, 8)), "GIF"))
    at = gif.index(b"\x2c", 13 + 3 * 2)
    gif[at + 5 : at + 9] = struct.pack("<HH", 60_000, 60_000)
    assert problem(bytes(gif)).kind == "too-large"


def test_what_came_out_is_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "_decompression_bomb_check", lambda *_, **__: None)  # a Pillow that asks no more
    assert problem(encoded(noise(), "PNG"), max_pixels=3000).kind == "too-large"


def test_limits_of_threads_do_not_mix() -> None:
    data = encoded(noise((50, 40)), "PNG")

    def read(index: int) -> str:
        try:
            return str(images.read_bytes(data, max_pixels=2000 if index % 2 else 1999).image.size)
        except InputError as error:
            return error.kind

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(read, range(400)))
    assert results == ["too-large", "(50, 40)"] * 200


def test_threads_read_what_one_reads() -> None:
    files = [encoded(noise(), kind, icc_profile=swapped_profile()) for kind in ("JPEG", "PNG", "TIFF", "WEBP")] * 20
    alone = [images.read_bytes(data).image.tobytes() for data in files]
    with ThreadPoolExecutor(8) as pool:
        assert [picture.image.tobytes() for picture in pool.map(images.read_bytes, files)] == alone


# ---- HEIC


def test_heic_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_heif_is_registered", False)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    for brand in (b"heic", b"mif1"):
        error = problem(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + b"\0" * 100)
        assert error.kind == "heic-extra"
        assert "pip install 'dbcap[heif]'" in error.hint
    avif = bytearray(encoded(noise(), "AVIF"))
    avif[8:12] = b"mif1"  # shares the brand, and needs no extra
    assert images.read_bytes(bytes(avif)).image.size == (64, 48)


def test_heic_is_read_and_damage_reported() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    data = encoded(plain("RGB", RED, (64, 64)), "HEIF", quality=95)
    assert near(pixel(data), RED, 12)
    half = encoded(plain("RGBA", (255, 0, 0, 0), (64, 64)), "HEIF", quality=95)
    assert near(pixel(half, alpha="#0000ff"), BLUE, 12)
    assert problem(data[: len(data) - 20]).kind in ("truncated", "damaged")
    assert problem(data, max_pixels=1000).kind == "too-large"


# ---- paths


def path_problem(path: str | os.PathLike[str]) -> InputError:
    with pytest.raises(InputError) as caught:
        images.read(path)
    return caught.value


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    expected = {
        tmp_path / "missing.png": ("missing", "no such file"),
        tmp_path / "link.png": ("missing", "is a link to nowhere"),
        tmp_path / "empty.png" / "x.png": ("missing", "no such file"),
        tmp_path: ("not-a-file", "is a folder, not a file"),
        tmp_path / "empty.png": ("empty", "the file is empty"),
        tmp_path / "loop.png": ("unreadable", f"cannot be read: {os.strerror(errno.ELOOP)}"),
        tmp_path / ("x" * 300): ("unreadable", f"cannot be read: {os.strerror(errno.ENAMETOOLONG)}"),
        "a\0b.png": ("missing", "no such file"),
        "/dev/null": ("not-a-file", "is a device, not a file"),
        "/dev/zero": ("not-a-file", "is a device, not a file"),
    }
    for path, (kind, message) in expected.items():
        error = path_problem(path)
        assert (error.kind, error.message) == (kind, message), path


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(noise(), "PNG"))
    path.chmod(0)
    if os.geteuid() == 0:  # whom nothing is denied

        def denied(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(builtins, "open", denied)
    error = path_problem(path)
    monkeypatch.undo()
    assert error.kind == "unreadable"
    assert "permission denied" in error.message


def test_socket_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("a.sock")
        assert path_problem("a.sock").kind == "not-a-file"


def test_names_of_any_bytes(tmp_path: Path) -> None:
    data = encoded(plain("RGB", RED), "PNG")
    for raw in (b"sp ace\n.png", b"caf\xe9 \xff.png", "ü漢.png".encode()):
        path = os.fsdecode(os.fsencode(tmp_path) + b"/" + raw)
        Path(path).write_bytes(data)
        assert images.read(path).sha256 == hashlib.sha256(data).hexdigest()


def test_pipes_are_read_to_the_end(tmp_path: Path) -> None:
    data = encoded(noise((400, 300)), "PNG")
    fifo = tmp_path / "fifo.png"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(data,))
    writer.start()
    assert images.read(fifo).sha256 == hashlib.sha256(data).hexdigest()
    writer.join()
    reading, writing = os.pipe()
    writer = threading.Thread(
        target=lambda: (os.write(writing, data[:1000]), os.write(writing, data[1000:]), os.close(writing))
    )
    writer.start()
    assert images.read(f"/dev/fd/{reading}").image.size == (400, 300)
    writer.join()
    os.close(reading)


def test_endless_pipe_and_huge_file_stop_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(images.MAX_FILE_BYTES + 1)  # sparse: takes no room
    assert path_problem(tmp_path / "huge.png").kind == "too-large"
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 3_000_000)
    with subprocess.Popen(["cat", "/dev/zero"], stdout=subprocess.PIPE) as endless:
        assert endless.stdout is not None
        error = path_problem(f"/dev/fd/{endless.stdout.fileno()}")
        endless.kill()
    assert error.kind == "too-large"
    assert "the limit is 3,000,000" in error.message


def test_file_at_the_limit_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(noise(), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", len(data))
    assert images.read(tmp_path / "a.png").image.size == (64, 48)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", len(data) - 1)
    assert path_problem(tmp_path / "a.png").kind == "too-large"


# ---- names


def test_picture_names() -> None:
    for name in (
        "a.jpg",
        "A.JPEG",
        "dir.x/b.PnG",
        "c.heic",
        "d.HIF",
        "e.avif",
        "f.jfif",
        "g.tif",
        ".h/i.webp",
        "j.k.gif",
    ):
        assert images.is_picture_name(name), name
    no_pictures = """jpg .jpg ._a.jpg x/._a.jpg .a.png a.mpg a.eps a.ps a.pdf a.wmf a.emf a.fits a.h5 a.hdf a.grib
        a.bufr a.cr2 a.dng a.mp4 a.txt a.jpg~ a.png.part"""
    for name in ("", *no_pictures.split()):
        assert not images.is_picture_name(name), name


def test_suffixes_are_those_of_the_formats_that_are_read() -> None:
    Image.init()
    assert set(images._formats()) == set(images._FORMATS)
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in (*images._FORMATS, "MPO")}
    assert known | {".heic", ".heif", ".hif"} == images.PICTURE_SUFFIXES
    refused = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
    assert set(Image.OPEN) - {"HEIF", "PDF"} - refused == set(images._FORMATS)


# ---- hostile data


def seeds() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    image, meta = noise((40, 30)), {"exif": exif, "icc_profile": swapped_profile()}
    found = {kind: encoded(image, kind, **meta) for kind in ("JPEG", "PNG", "TIFF", "WEBP", "MPO", "AVIF")}
    found |= {kind: encoded(image, kind) for kind in ("GIF", "BMP", "ICO", "ICNS", "TGA", "JPEG2000", "PCX", "QOI")}
    found |= {
        name: encoded(image, "TIFF", compression=name)
        for name in ("tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits")
    }
    found["palette"] = encoded(image.quantize(), "PNG", transparency=b"\0\x80\xff")
    found["animation"] = encoded(image, "GIF", save_all=True, append_images=[image.rotate(20)])
    found["deep"] = encoded(Image.new("I;16", (20, 20), 300), "PNG")
    return found


SEEDS = seeds()


def check_hostile(data: bytes) -> None:
    failure = picture = None
    with silent_stderr():
        try:
            picture = images.read_bytes(data, max_pixels=1_000_000)
        except InputError as error:
            failure = error
    if picture:
        assert picture.image.mode == "RGB"
        assert len(picture.image.tobytes()) == 3 * picture.width * picture.height
    else:
        assert str(failure).isprintable()


@settings(max_examples=200, database=None)
@given(st.binary(max_size=400))
def test_random_bytes(data: bytes) -> None:
    check_hostile(data)


@settings(max_examples=600, database=None)
@given(
    st.sampled_from(sorted(SEEDS)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.lists(st.tuples(st.integers(0, 150), st.sampled_from([0, 1, 127, 255])), max_size=4),
    st.none() | st.floats(0, 1),
)
def test_mutated_and_truncated_files(
    name: str, anywhere: list[tuple[float, int]], early: list[tuple[int, int]], cut: float | None
) -> None:
    data = bytearray(SEEDS[name])
    for place, value in [(int(where * len(data)), value) for where, value in anywhere] + early:
        data[min(place, len(data) - 1)] = value
    check_hostile(bytes(data if cut is None else data[: int(cut * len(data))]))


def test_nothing_reaches_stderr_in_a_process_of_its_own(tmp_path: Path) -> None:
    """With Python's own warning and logging set-up, which pytest replaces."""
    samples = bytearray(encoded(plain("RGB", RED), "TIFF"))
    samples[samples.index(b"\x15\x01") + 8] = 9  # samples per pixel: Pillow logs an error
    files = {
        "exif.jpg": with_app(encoded(noise(), "JPEG"), 0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"),
        "samples.tif": bytes(samples),
        "lzw.tif": SEEDS["tiff_lzw"][:8] + b"\xff" * 50 + SEEDS["tiff_lzw"][58:],
        "icon.ico": icon(encoded(noise(), "PNG"), "ico"),
        "actl.png": png(8, 2, bytes(RED), chunk(b"acTL", struct.pack(">II", 0, 0))),
        "bomb.png": claiming(15_000),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    script = """if True:
        import sys
        from dbcap import images
        from dbcap.errors import InputError
        for path in sys.argv[1:]:
            try:
                images.read(path)
            except InputError as error:
                print(error.kind)
    """
    paths = [str(tmp_path / name) for name in files]
    done = subprocess.run([sys.executable, "-W", "always", "-c", script, *paths], capture_output=True, check=True)
    assert done.stderr == b""
    assert b"too-large" in done.stdout


def test_program_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", stopped)
    with pytest.raises(KeyboardInterrupt):
        images.read_bytes(SEEDS["PNG"])
