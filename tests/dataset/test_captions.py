"""Captions that stand beside photos, whoever wrote them with whatever program."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbcap.dataset.captions import Written, one_line, text_of
from dbcap.dataset.remembering import Remembering
from dbcap.events import Silent


@pytest.fixture
def heard():
    return Remembering(Silent())


@pytest.mark.parametrize(
    ("data", "text", "warning"),
    [
        (b"a caf\xc3\xa9", "a café", ""),
        (b"\xef\xbb\xbfa dog", "a dog", ""),
        (b"a caf\xe9 \x93so\x94", "a café “so”", "x.txt is no UTF-8: it was read as cp1252"),
        (b"\x81\xe9", "\x81é", "x.txt is no UTF-8: it was read as latin-1"),
        ("a café".encode("utf-16"), "a café", "x.txt is in UTF-16: save it as UTF-8"),
        (b"\xfe\xff" + "a dog".encode("utf-16-be"), "a dog", "x.txt is in UTF-16: save it as UTF-8"),
        (b"", "", ""),
    ],
)
def test_encodings(data, text, warning, heard):
    assert text_of(data, "x.txt", heard) == text
    assert "".join(heard.warnings) == warning


@given(st.binary())
def test_every_file_is_read_somehow(data):
    heard = Remembering(Silent())
    text = text_of(data, "x", heard)
    assert isinstance(text, str)
    assert text.encode("utf-8", "replace") == data or heard.warnings or data[:3] == b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a dog\r\non grass\r\n", "a dog, on grass"),
        ("a dog\ron grass", "a dog, on grass"),
        ("\n\n a  dog \n \n\tin snow\n", "a dog, in snow"),
        (" \r\n\t\n", ""),
    ],
)
def test_lines_are_joined_by_commas(text, line):
    assert one_line(text) == line


def test_the_first_that_is_not_empty_counts(tmp_path, heard):
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.txt").write_text(" \r\n" if name != "a" else "from txt")
        if name in "ab":
            (tmp_path / f"{name}.caption").write_bytes(b"\xef\xbb\xbffrom caption\r\n")
    rows = [{"file_name": f"./{name}.jpg", "text": f"row {name}"} for name in ("a", "b", "c")]
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode() + b"\r\n")
    written = Written(heard)
    assert [written.of(tmp_path / f"{name}.jpg") for name in "abcd"] == ["from txt", "from caption", "row c", ""]
    assert heard.warnings == []


def test_rows_that_make_no_sense_are_named(tmp_path, heard):
    lines = [
        "no json",
        '["a list"]',
        '{"file_name": "a.jpg", "text": "a dog\u2028on grass", "tags": [1]}',
        '{"file_name": "b.jpg"}',
        '{"file_name": "c.jpg", "text": null}',
        '{"file_name": "d.jpg", "text": 7}',
        '{"text": "nobody"}',
    ]
    path = tmp_path / "metadata.jsonl"
    path.write_text("\n".join(lines), "utf-8")
    written = Written(heard)
    assert [written.of(tmp_path / f"{name}.jpg") for name in "abcd"] == ["a dog on grass", "", "", ""]
    assert heard.warnings == [
        f"{path}, line {number}: no row of file_name and text; left out" for number in (1, 2, 6, 7)
    ]


def test_a_photo_is_not_its_own_caption(tmp_path, heard):
    photo = tmp_path / "photo.txt"
    photo.write_bytes(b"\x89PNG")
    assert Written(heard).of(photo) == ""


def test_a_caption_that_cannot_be_read_is_missing(tmp_path, heard, monkeypatch):
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "a.caption").write_text("a dog")
    (tmp_path / "b.txt").write_text("a cat")

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    written = Written(heard)
    assert written.of(tmp_path / "a.jpg") == "a dog"
    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    assert written.of(tmp_path / "b.jpg") == ""
    assert heard.warnings == [f"cannot read {tmp_path / 'b.txt'}: Permission denied"]
