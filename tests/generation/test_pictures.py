"""Pictures that say how they were made, and what is made of pictures that do not."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dbcap.config.models import SCHEDULERS
from dbcap.errors import DbcapError
from dbcap.generation.jobs import Job
from dbcap.generation.pictures import ENDINGS, encoded, facts_of, grid, parameters

JOB = Job("ab" * 32, "a cat", "", 2**64 - 1, 64, 32, "euler-a", 30, 7.5)
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
PROMPTS = [
    "a cat",
    "é",
    "犬の写真 🐕",
    "\u202eשלום",
    "a\nb\r\nc",
    'say "x", \\ {a|b}',
    "\x00\x1b\x7f\x85\u2028",
    "x" * 5000,
]


def facts(job: Job, **more: object) -> dict[str, object]:
    return {"key": job.key, "job": dataclasses.asdict(job), **more}


def text_of(data: bytes) -> str:
    """Read the text as the web UI does: from its PNG chunk, or from the comment in Exif."""
    with Image.open(io.BytesIO(data)) as image:
        if image.format == "PNG":
            return str(image.info["parameters"])
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0")
    return str(comment[8:].decode("utf-16-be"))


def write(folder: Path, kind: str, job: Job = JOB) -> Path:
    path = folder / f"x{ENDINGS[kind]}"
    path.write_bytes(encoded(PIXELS, kind, parameters(job, "model", job.scheduler, "1.0"), facts(job)))
    return path


# ---- there and back


@pytest.mark.parametrize("kind", ENDINGS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_what_is_written_is_read(tmp_path, kind, prompt):
    job = dataclasses.replace(JOB, prompt=prompt, negative=prompt[::-1], additions=(("cd" * 32, 0.5),))
    path = write(tmp_path, kind, job)
    found = facts_of(path)
    assert found is not None
    assert found["key"] == job.key
    again = Job(**{**found["job"], "additions": tuple(map(tuple, found["job"]["additions"]))})
    assert again == job
    assert again.key == job.key
    assert text_of(path.read_bytes()) == parameters(job, "model", job.scheduler, "1.0")


@settings(max_examples=40)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 2**64 - 1), st.sampled_from(sorted(ENDINGS)))
def test_any_text_and_seed(tmp_path_factory, prompt, seed, kind):
    job = dataclasses.replace(JOB, prompt=prompt, seed=seed)
    path = write(tmp_path_factory.mktemp("any"), kind, job)
    found = facts_of(path)
    assert found is not None
    assert (found["job"]["prompt"], found["job"]["seed"]) == (prompt, seed)
    assert text_of(path.read_bytes()) == parameters(job, "model", job.scheduler, "1.0")


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_pixels_are_exact(kind):
    with Image.open(io.BytesIO(encoded(PIXELS, kind, "é", {"a": 1}))) as image:
        assert image.format == kind.upper()
        assert image.mode == "RGB"
        assert np.array_equal(np.array(image), PIXELS)


def test_a_jpeg_is_near():
    smooth = np.repeat(np.add.outer(np.arange(32), np.arange(64))[..., None], 3, 2).astype(np.uint8)
    data = encoded(smooth, "jpeg", "text", {})
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "JPEG"
        assert np.abs(np.array(image).astype(int) - smooth).max() <= 8


def test_a_file_is_the_same_every_time():
    for kind in ENDINGS:
        assert encoded(PIXELS, kind, "é", {"a": 1}) == encoded(PIXELS, kind, "é", {"a": 1})


def test_a_text_that_is_ascii_is_in_the_chunk_that_every_tool_reads():
    assert b"tEXtparameters\0a cat" in encoded(PIXELS, "png", "a cat", {})
    assert b"iTXtparameters\0" in encoded(PIXELS, "png", "é", {})


def test_a_prompt_without_room_in_a_jpeg_is_one_line(tmp_path):
    long = dataclasses.replace(JOB, prompt="犬" * 20_000)
    with pytest.raises(
        DbcapError, match=r"^the prompt is too long to be kept in a JPEG; use --image-format png or webp$"
    ):
        write(tmp_path, "jpeg", long)
    for kind in ("png", "webp"):
        found = facts_of(write(tmp_path, kind, long))
        assert found is not None
        assert found["job"]["prompt"] == long.prompt
    assert facts_of(write(tmp_path, "jpeg", dataclasses.replace(JOB, prompt="x" * 19_000)))


# ---- A1111's text


def test_the_text_of_a_picture():
    job = dataclasses.replace(JOB, prompt="a cat,\non a mat", negative="blurry,\n\nugly")
    assert parameters(job, "org/name", "euler-a", "1.2").split("\n") == [
        "a cat,",
        "on a mat",
        "Negative prompt: blurry,",
        "",
        "ugly",
        "Steps: 30, Sampler: Euler a, CFG scale: 7.5, Seed: 18446744073709551615, Size: 64x32, Model hash: ababababab, "
        "Model: org/name, Version: dbcap 1.2",
    ]
    changed = dataclasses.replace(JOB, init="ef" * 32, strength=0.75, guidance=7.0)
    text = parameters(changed, "m", "ddim", "1.2")
    assert "Negative prompt" not in text
    assert ", CFG scale: 7, " in text
    assert ", Denoising strength: 0.75, Version: dbcap 1.2" in text


@pytest.mark.parametrize("model", ["plain", "a, b", "run:my-dog@last", "a\nb", 'the "best", \\ one', "犬, 猫", ""])
@pytest.mark.parametrize("prompt", ["a cat", "one\ntwo, Steps: 3", "Size: 1x1"])
def test_the_last_line_can_be_taken_apart(model, prompt):
    """A value with a comma, a colon or a line end stands in quotation marks, as JSON has them."""
    text = parameters(dataclasses.replace(JOB, prompt=prompt, negative="n"), model, "dpm++-karras", "1")
    *_, negative, last = text.split("\n")
    assert text.startswith(prompt + "\nNegative prompt: n\n")
    assert negative == "Negative prompt: n"
    pairs = re.findall(r'\s*(\w[\w ]*): ("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)', last)
    values = {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}
    assert values == {
        "Steps": "30",
        "Sampler": "DPM++ 2M Karras",
        "CFG scale": "7.5",
        "Seed": str(JOB.seed),
        "Size": "64x32",
        "Model hash": "ababababab",
        "Model": model,
        "Version": "dbcap 1",
    }


def test_every_sampler_has_a_name_of_its_own():
    names = {re.search(r"Sampler: ([^,]*),", parameters(JOB, "m", one, "1"))[1] for one in SCHEDULERS}  # type: ignore[index]
    assert len(names) == len(SCHEDULERS)
    assert not names & set(SCHEDULERS)


def test_a_path_that_is_no_utf_8_can_be_written():
    text = parameters(JOB, "caf\udce9", "ddim", "1")
    assert "Model: caf?, " in text
    for kind in ENDINGS:
        assert text_of(encoded(PIXELS, kind, text, {"model": "caf\udce9"})) == text


# ---- pictures of others, broken ones, none


def png_with(document: str | bytes) -> bytes:
    info, buffer = PngInfo(), io.BytesIO()
    info.add_text("dbcap", document)
    Image.new("RGB", (2, 2)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def saved(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def described(text: str | int) -> bytes:
    exif = Image.Exif()
    exif[0x010E] = text
    return saved("JPEG", exif=exif)


def bomb() -> bytes:
    head = struct.pack(">II5B", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(head)) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


STRANGE = {
    "empty": b"",
    "text": b"not a picture",
    "zeros": bytes(5000),
    "signature": b"\x89PNG\r\n\x1a\n",
    "plain png": saved("PNG"),
    "plain jpeg": saved("JPEG"),
    "plain webp": saved("WEBP"),
    "gif": saved("GIF"),
    "no json": png_with("{"),
    "a list": png_with("[1]"),
    "a number": png_with("1"),
    "null": png_with("null"),
    "deep": png_with("[" * 100_000),
    "huge number": png_with("9" * 5000),
    "no key": png_with('{"job": {}}'),
    "no job": png_with('{"key": "x"}'),
    "a key that is none": png_with('{"key": 5, "job": {}}'),
    "a job that is none": png_with('{"key": "x", "job": 5}'),
    "somebody's caption": described("a dog"),
    "somebody's json": described('{"a": 1}'),
    "a number for a text": described(5),
    "bad exif": saved("JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "cut exif": saved("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0\x0e\x01\x02\0\xff\0\0\0\x10\0"),
    "bomb": bomb(),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
}


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_what_says_nothing_gives_none_in_silence(tmp_path, name, ending, capfd, caplog):
    path = tmp_path / f"x{ending}"
    path.write_bytes(STRANGE[name])
    with warnings.catch_warnings(record=True) as heard, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        assert facts_of(path) is None
    assert not heard
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_what_is_no_file_gives_none(tmp_path):
    assert facts_of(tmp_path) is None
    assert facts_of(tmp_path / "none.png") is None
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert facts_of(tmp_path / "loop.png") is None
    assert facts_of(tmp_path / "a\0.png") is None


@pytest.mark.parametrize("kind", ENDINGS)
def test_a_picture_that_is_cut_or_spoilt_is_no_crash(tmp_path, kind):
    data = write(tmp_path, kind).read_bytes()
    path = tmp_path / "cut"
    random = np.random.default_rng(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in range(0, min(len(data), 1200), 7):
            path.write_bytes(data[:length])
            assert facts_of(path) in (None, json.loads(json.dumps(facts(JOB))))
        for _ in range(100):
            spoilt = bytearray(data)
            for at in random.integers(0, min(len(data), 1500), 4):
                spoilt[at] = random.integers(256)
            path.write_bytes(spoilt)
            found = facts_of(path)
            assert found is None or {"key", "job"} <= set(found)


def test_pixels_are_not_decoded(tmp_path, monkeypatch):
    for kind in ENDINGS:
        path = write(tmp_path, kind)
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "load", lambda _: pytest.fail("pixels were decoded"))
            assert facts_of(path)


# ---- the grid


def squares(count: int, size: tuple[int, int] = (4, 3)) -> list[Image.Image]:
    return [Image.new("RGB", size, (number + 1, 0, 0)) for number in range(count)]


def layout(whole: Image.Image, width: int = 4, height: int = 3) -> list[list[int]]:
    cells = np.array(whole)[:, :, 0].reshape(whole.height // height, height, whole.width // width, width)
    assert (cells == cells[:, :1, :, :1]).all()
    return cells[:, 0, :, 0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("count", "columns", "rows"),
    [
        (1, None, [[1]]),
        (2, None, [[1], [2]]),
        (3, None, [[1, 2], [3, 0]]),
        (4, None, [[1, 2], [3, 4]]),
        (5, None, [[1, 2], [3, 4], [5, 0]]),
        (6, 3, [[1, 2, 3], [4, 5, 6]]),
        (4, 3, [[1, 2, 3], [4, 0, 0]]),
        (2, 5, [[1, 2, 0, 0, 0]]),
        (3, 1, [[1], [2], [3]]),
    ],
)
def test_pictures_stand_in_rows(count, columns, rows):
    assert layout(grid(squares(count), columns)) == rows


def test_pictures_of_several_sizes_have_the_room_of_the_largest():
    whole = grid([*squares(1, (2, 6)), *squares(1, (5, 1))], 2)
    assert whole.size == (10, 6)
    red = np.array(whole)[:, :, 0]
    assert red[:, :2].all()
    assert red[0, 5:].all()
    assert red.sum() == 2 * 6 + 5
