from __future__ import annotations

import csv
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbcap.captioning.records import (
    LINE_FORMATS,
    Existing,
    MetadataFolder,
    Placed,
    Sidecar,
    collisions,
    json_bytes,
)
from dbcap.errors import DbcapError, InputError, UsageError
from dbcap.inputs import Source, discover, shown
from dbcap.plugins.api import Candidate, Record


def record(path: str = "p/a.jpg", *captions: str, scores: tuple[float, ...] = ()) -> Record:
    texts = captions or ("two dogs",)
    numbers = scores or tuple(-0.5 - index for index in range(len(texts)))
    candidates = tuple(Candidate(text, number) for text, number in zip(texts, numbers, strict=True))
    return Record(path, "0f" * 32, 640, 480, candidates, "starter", 7)


def document(name: str, *records: Record, with_path: bool = True, base: Path = Path()) -> bytes:
    writer = LINE_FORMATS[name](with_path=with_path, base=base)
    rows = [writer.row(item, index == 0) for index, item in enumerate(records)]
    assert all(row.endswith(b"\n") for row in rows), "a torn last line must be recognisable"
    return writer.header() + b"".join(rows) + writer.footer(not rows)


def photo(folder: Path, name: str, root: str = "") -> Source:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"image")
    return Source(os.path.join(folder, name), root)


# --- lines: golden bytes ----------------------------------------------------------------------------------

AWKWARD = os.fsdecode(b"a b\t\xff\n.jpg")


def test_text() -> None:
    assert (
        document("text", record(), record(AWKWARD, "a \tb\n")) == b"p/a.jpg\ttwo dogs\na b\\t\xff\\n.jpg\ta \\tb\\n\n"
    )
    assert document("text", record("é.jpg", "é", "b"), with_path=False) == "é\nb\n".encode()


def test_tsv_always_has_the_path_and_a_line_for_each_candidate() -> None:
    assert document("tsv", record("a.jpg", "x", "y"), with_path=False) == b"a.jpg\tx\na.jpg\ty\n"


def test_csv() -> None:
    rows = [record(), record('say "hi", you.jpg', "x", "y\nz"), record(os.fsdecode(b"\xe9\r.jpg"), "ü")]
    assert document("csv", *rows) == (
        b'path,caption\np/a.jpg,two dogs\n"say ""hi"", you.jpg",x\n"say ""hi"", you.jpg","y\nz"\n'
        b'"\xe9\r.jpg",' + "ü\n".encode()
    )
    assert document("csv") == b"path,caption\n"


ROW = (
    b'{"path": "p/a.jpg", "sha256": "' + b"0f" * 32 + b'", "width": 640, "height": 480, "caption": "two dogs", '
    b'"captions": [{"text": "two dogs", "score": -0.5}], "model": "starter", "seed": 7}'
)


def test_jsonl() -> None:
    assert document("jsonl", record(), record()) == ROW + b"\n" + ROW + b"\n"
    assert document("jsonl") == b""


def test_json_is_a_document_at_any_length() -> None:
    assert document("json") == b"[\n]\n"
    assert document("json", record()) == b"[\n " + ROW + b"\n]\n"
    assert document("json", record(), record()) == b"[\n " + ROW + b"\n," + ROW + b"\n]\n"
    for count in range(4):
        assert len(json.loads(document("json", *[record()] * count))) == count


def test_json_escapes_only_what_utf8_cannot_hold() -> None:
    line = document("jsonl", record(AWKWARD, "é 😀 \u2028"))
    assert rb'"path": "a b\t\udcff\n.jpg"' in line
    assert "é 😀 \u2028".encode() in line
    assert os.fsencode(json.loads(line)["path"]) == b"a b\t\xff\n.jpg"
    assert json_bytes("\udcff") == rb'"\udcff"'


def test_scores_have_three_decimals() -> None:
    line = document("jsonl", record("a", *"abcde", scores=(-0.0001, 1 / 3, -1.23456, -0.0, float("-inf"))))
    assert [item["score"] for item in json.loads(line)["captions"]] == [0.0, 0.333, -1.235, 0.0, None]
    assert b"-0.0," not in line
    assert b"-0.0}" not in line
    assert json.loads(line)["caption"] == "a"


def test_metadata_lines_name_files_relative_to_their_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [record("p/a.jpg", "x"), record("./b.jpg", "y", "z"), record("https://h/c.jpg", "w")]
    assert document("metadata", *rows) == (
        b'{"file_name": "p/a.jpg", "text": "x"}\n'
        b'{"file_name": "b.jpg", "text": "y", "texts": ["y", "z"]}\n'
        b'{"file_name": "https://h/c.jpg", "text": "w"}\n'
    )
    out = document("metadata", record("p/a.jpg", "x"), record(str(tmp_path / "b.jpg"), "y"), base=Path("p"))
    assert [json.loads(line)["file_name"] for line in out.splitlines()] == ["a.jpg", "../b.jpg"]


def test_the_formats_are_those_of_the_command() -> None:
    assert sorted(LINE_FORMATS) == ["csv", "json", "jsonl", "metadata", "text", "tsv"]


# --- lines: round trips -----------------------------------------------------------------------------------

paths = st.binary(min_size=1, max_size=30).map(lambda raw: os.fsdecode(raw.replace(b"\0", b"0")))
captions = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
records = st.builds(lambda path, texts: record(path, *texts), paths, st.lists(captions, min_size=1, max_size=3))
many = st.lists(records, max_size=4)


def flat(items: list[Record]) -> list[tuple[str, str]]:
    return [(item.path, candidate.text) for item in items for candidate in item.captions]


@given(many)
def test_csv_reads_back(items: list[Record]) -> None:
    text = document("csv", *items).decode("utf-8", "surrogateescape")
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert [tuple(row) for row in rows] == [("path", "caption"), *flat(items)]


@given(many)
def test_tsv_reads_back(items: list[Record]) -> None:
    lines = document("tsv", *items).split(b"\n")
    assert lines.pop() == b""
    rows = [tuple(part.decode("utf-8", "surrogateescape") for part in line.split(b"\t")) for line in lines]
    assert rows == [(shown(path), shown(caption)) for path, caption in flat(items)]


@given(many)
def test_json_and_jsonl_read_back(items: list[Record]) -> None:
    lines = document("jsonl", *items).split(b"\n")
    assert lines.pop() == b""
    rows = [json.loads(line) for line in lines]
    assert [(row["path"], one["text"]) for row in rows for one in row["captions"]] == flat(items)
    assert [row["caption"] for row in rows] == [item.caption for item in items]
    assert json.loads(document("json", *items)) == rows


@given(records)
def test_metadata_reads_back(item: Record) -> None:
    row = json.loads(document("metadata", item, base=Path("/")))
    named = os.path.normpath(os.path.join("/", row["file_name"]))
    assert named == os.path.normpath(os.path.abspath(item.path)).replace("//", "/")
    assert row.get("texts", [row["text"]]) == [candidate.text for candidate in item.captions]


# --- sidecars ---------------------------------------------------------------------------------------------


def write(placed: Placed, source: Source, existing: Existing, *texts: str) -> None:
    placed.check([source])
    placed.write(source, record(source.name, *texts), existing)
    placed.flush()


@pytest.mark.parametrize(
    ("name", "extension", "target"),
    [
        ("p/a.jpg", ".txt", "p/a.txt"),
        ("./a.b.JPG", "caption", "a.b.caption"),
        ("d.x/photo", ".txt", "d.x/photo.txt"),
        (".hidden", ".tar.gz", ".hidden.tar.gz"),
    ],
)
def test_a_sidecar_has_the_name_of_the_image(name: str, extension: str, target: str) -> None:
    assert Sidecar(extension).target(Source(name)) == Path(target)


def test_a_sidecar_keeps_the_bytes_of_the_name(tmp_path: Path) -> None:
    source = photo(tmp_path, os.fsdecode(b"a \n\xff.jpg"))
    write(Sidecar(), source, "skip", "ein Bär")
    assert Path(os.fsdecode(os.fsencode(tmp_path) + b"/a \n\xff.txt")).read_bytes() == "ein Bär\n".encode()


def test_a_sidecar_has_a_line_for_each_candidate(tmp_path: Path) -> None:
    source = photo(tmp_path, "a.jpg")
    write(Sidecar(), source, "skip", "one\r\nline", "two\u2028lines")
    assert (tmp_path / "a.txt").read_bytes() == b"one line\ntwo lines\n"


@pytest.mark.parametrize(
    ("existing", "old", "new", "result"),
    [
        ("skip", b"old", ["new"], b"old"),
        ("overwrite", b"old\n", ["new"], b"new\n"),
        ("append", b"old\r\n", ["new"], b"old, new\n"),
        ("prepend", b"\xef\xbb\xbfold \n", ["new"], b"new, old\n"),
        ("append", b"caf\xe9", ["new"], b"caf\xe9, new\n"),
        ("append", "\ufeffé".encode("utf-16-le"), ["new"], "é, new\n".encode()),
        ("append", b"old\n", ["n", "m"], b"old\nn\nm\n"),
        ("prepend", b"old\n", ["n", "m"], b"n\nm\nold\n"),
        ("append", b"o\r\np\n", ["new"], b"o\np\nnew\n"),
        ("overwrite", b"o\np\n", ["n", "m"], b"n\nm\n"),
        ("append", b"old", [""], b"old\n"),
        *[(existing, b" \n", ["new"], b"new\n") for existing in ("skip", "append", "error")],
        *[(existing, b"", ["new"], b"new\n") for existing in ("skip", "prepend", "error")],
    ],
)
def test_what_is_there(tmp_path: Path, existing: Existing, old: bytes, new: list[str], result: bytes) -> None:
    source, sidecar = photo(tmp_path, "a.jpg"), Sidecar()
    assert not sidecar.has(source)
    (tmp_path / "a.txt").write_bytes(old)
    assert sidecar.has(source) == bool(old.strip())
    write(sidecar, source, existing, *new)
    assert (tmp_path / "a.txt").read_bytes() == result


def test_existing_error(tmp_path: Path) -> None:
    source = photo(tmp_path, "a.jpg")
    (tmp_path / "a.txt").write_bytes(b"old")
    with pytest.raises(InputError, match=r"a\.txt has a caption") as caught:
        write(Sidecar(), source, "error", "new")
    assert caught.value.kind == "exists"
    assert (tmp_path / "a.txt").read_bytes() == b"old"


def test_a_sidecar_is_replaced_at_once(tmp_path: Path) -> None:
    source = photo(tmp_path, "a.jpg")
    old = tmp_path / "a.txt"
    old.write_bytes(b"old")
    old.chmod(0o640)
    with old.open("rb") as reader:
        write(Sidecar(), source, "overwrite", "new and longer")
        assert reader.read() == b"old"  # another file took its name
    assert stat.S_IMODE(old.stat().st_mode) == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "a.txt"]


@pytest.mark.parametrize("existing", ["overwrite", "append", "prepend"])
def test_what_is_no_text_is_not_replaced(tmp_path: Path, existing: Existing) -> None:
    source = photo(tmp_path, "a.jpg")
    (tmp_path / "a.txt").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(InputError, match="no text file"):
        write(Sidecar(), source, existing, "new")
    assert (tmp_path / "a.txt").read_bytes() == b"\x89PNG\0\0"


def test_an_image_is_not_its_own_sidecar(tmp_path: Path) -> None:
    source = photo(tmp_path, "a.txt")
    sidecar = Sidecar()
    sidecar.check([source])  # it fails alone: the others of the run are written
    for call in (lambda: sidecar.has(source), lambda: sidecar.write(source, record(), "overwrite")):
        with pytest.raises(InputError, match="would replace it"):
            call()
    assert (tmp_path / "a.txt").read_bytes() == b"image"


@pytest.mark.parametrize("extension", ["", ".", "a/b", ".jpg", "PNG", "x\0"])
def test_extensions_that_cannot_be(extension: str) -> None:
    with pytest.raises(UsageError):
        Sidecar(extension)


def test_a_sidecar_that_cannot_be_written_fails_that_image(tmp_path: Path) -> None:
    source = photo(tmp_path, "a.jpg")
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(InputError, match=r"a\.txt: Is a directory") as caught:
        write(Sidecar(), source, "overwrite", "x")
    assert caught.value.kind == "unwritable"


def test_a_full_disk_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    source = photo(tmp_path, "a.jpg")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DbcapError, match="No space left") as caught:
        write(Sidecar(), source, "skip", "x")
    assert not isinstance(caught.value, InputError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg"]


@pytest.mark.parametrize("placed", [Sidecar(), MetadataFolder()])
def test_urls_have_no_place(placed: Placed) -> None:
    source = Source("https://h/a.jpg", is_url=True)
    with pytest.raises(UsageError, match=r"https://h/a\.jpg"):
        placed.target(source)
    with pytest.raises(UsageError):
        placed.check([source])


# --- collisions -------------------------------------------------------------------------------------------


def test_two_images_that_would_share_a_sidecar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["a.jpg", "b.jpg", "p/a.jpg", "./a.png", str(tmp_path / "a.gif"), "a.jpg.png"]
    sources = [Source(name) for name in names]
    pairs = collisions(sources, Sidecar())
    assert [(one.name, two.name) for one, two in pairs] == [("a.jpg", "./a.png"), ("a.jpg", str(tmp_path / "a.gif"))]
    with pytest.raises(UsageError, match=r"a\.jpg and \./a\.png would share a\.txt, and there are 1 more"):
        Sidecar().check(sources)
    assert collisions([Source("a.jpg"), Source("a.png", error=InputError("no", kind="missing"))], Sidecar()) == []


def test_links_to_the_folder_are_seen_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photo(Path("p"), "a.jpg")
    Path("q").symlink_to("p")
    assert collisions([Source("p/a.jpg"), Source("q/a.jpg")], Sidecar()) == []
    assert len(collisions([Source("p/a.jpg"), Source("q/a.png")], Sidecar())) == 1


# --- metadata.jsonl ---------------------------------------------------------------------------------------


def test_metadata_goes_to_the_folder_that_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photo(Path("p/s"), "b.jpg")
    photo(Path("p"), os.fsdecode(b"\xff.jpg"))
    photo(Path("o"), "c.jpg")
    photo(Path(), "d.jpg")
    placed = MetadataFolder()
    sources = discover(["./p/", "o/c.jpg", "d.jpg"], recursive=True).sources
    placed.check(sources)
    for source in sources:
        assert not placed.has(source)
        placed.write(source, record(source.name, f"of {os.path.basename(source.name)[0]}"), "skip")
        assert placed.has(source)
    assert not Path("p/metadata.jsonl").exists()
    placed.flush()
    assert Path("p/metadata.jsonl").read_bytes() == (
        b'{"file_name": "s/b.jpg", "text": "of b"}\n{"file_name": "\\udcff.jpg", "text": "of \\udcff"}\n'
    )
    assert Path("o/metadata.jsonl").read_bytes() == b'{"file_name": "c.jpg", "text": "of c"}\n'
    assert Path("metadata.jsonl").read_bytes() == b'{"file_name": "d.jpg", "text": "of d"}\n'
    assert MetadataFolder().has(sources[1])


OLD = (
    b'\xef\xbb\xbf{"text":"first" ,  "file_name":"z.jpg"}\r\n'
    b"\n"
    b'{"label": 1e2, "file_name": "./a.jpg", "text": "old", "texts": ["old"]}\r\n'
    b'{"other": "\xc3\xa9"}\n'
    b'{"file_name": "n.jpg", "label": 3}'
)


@pytest.mark.parametrize(
    ("existing", "texts", "row"),
    [
        ("overwrite", ["new"], {"text": "new"}),
        ("overwrite", ["n", "m"], {"text": "n", "texts": ["n", "m"]}),
        ("append", ["new"], {"text": "old, new", "texts": ["old", "new"]}),
        ("prepend", ["n", "m"], {"text": "n, old", "texts": ["n", "m", "old"]}),
    ],
)
def test_a_row_is_replaced_in_its_place(tmp_path: Path, existing: Existing, texts: list[str], row: Any) -> None:
    source = photo(tmp_path, "a.jpg")
    table = tmp_path / "metadata.jsonl"
    table.write_bytes(OLD)
    assert MetadataFolder().has(source)
    write(MetadataFolder(), source, existing, *texts)
    old, new = OLD.split(b"\n"), table.read_bytes().split(b"\n")
    assert new[:2] + new[3:] == old[:2] + old[3:]  # byte for byte
    assert new[2].endswith(b"\r")
    assert json.loads(new[2]) == {"label": 100.0, "file_name": "./a.jpg"} | row
    assert next(iter(json.loads(new[2]))) == "label"


def test_append_without_other_candidates_joins(tmp_path: Path) -> None:
    source = photo(tmp_path, "z.jpg")
    table = tmp_path / "metadata.jsonl"
    table.write_bytes(OLD)
    write(MetadataFolder(), source, "append", "new")
    line = table.read_bytes().split(b"\n")[0]
    assert line == b'\xef\xbb\xbf{"text": "first, new", "file_name": "z.jpg"}\r'


def test_new_rows_go_to_the_end(tmp_path: Path) -> None:
    source = photo(tmp_path, "q.jpg")
    table = tmp_path / "metadata.jsonl"
    table.write_bytes(OLD)
    write(MetadataFolder(), source, "skip", "new")
    assert table.read_bytes() == OLD + b'\n{"file_name": "q.jpg", "text": "new"}\n'


def test_a_row_without_text_is_completed(tmp_path: Path) -> None:
    source = photo(tmp_path, "n.jpg")
    table = tmp_path / "metadata.jsonl"
    table.write_bytes(OLD)
    assert not MetadataFolder().has(source)
    write(MetadataFolder(), source, "skip", "new")
    assert table.read_bytes().endswith(b'\n{"file_name": "n.jpg", "label": 3, "text": "new"}\n')


def test_skip_and_error_leave_the_file_alone(tmp_path: Path) -> None:
    source = photo(tmp_path, "a.jpg")
    table = tmp_path / "metadata.jsonl"
    table.write_bytes(OLD)
    before = table.stat().st_ino
    write(MetadataFolder(), source, "skip", "new")
    with pytest.raises(InputError, match="has a caption") as caught:
        write(MetadataFolder(), source, "error", "new")
    assert caught.value.kind == "exists"
    assert table.read_bytes() == OLD
    assert table.stat().st_ino == before  # not even written again


def test_rows_of_the_same_image_are_all_replaced(tmp_path: Path) -> None:
    source = photo(tmp_path, "a.jpg")
    table = tmp_path / "metadata.jsonl"
    table.write_bytes(b'{"file_name": "a.jpg", "text": "x"}\n' * 2)
    write(MetadataFolder(), source, "overwrite", "new")
    assert [json.loads(line)["text"] for line in table.read_bytes().splitlines()] == ["new", "new"]


@pytest.mark.parametrize("line", [b"{", b"[]", b"1", b'{"a": "\xff"}', b"[" * 100_000])
def test_a_broken_line_is_named_before_any_work(tmp_path: Path, line: bytes) -> None:
    source = photo(tmp_path, "a.jpg")
    table = tmp_path / "metadata.jsonl"
    table.write_bytes(b'{"file_name": "b.jpg"}\n\n' + line + b"\n{}\n")
    with pytest.raises(DbcapError, match=r"metadata\.jsonl, line 3"):
        MetadataFolder().check([source])


def test_append_to_what_is_no_text(tmp_path: Path) -> None:
    source = photo(tmp_path, "a.jpg")
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.jpg", "text": ["x"]}\n')
    with pytest.raises(InputError, match="no text"):
        write(MetadataFolder(), source, "append", "new")


def test_one_table_for_a_folder_with_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photo(Path("p"), "a.jpg")
    photo(Path("p"), "b.jpg")
    Path("q").symlink_to("p")
    placed = MetadataFolder()
    for source in (Source("p/a.jpg"), Source("q/b.jpg")):
        placed.write(source, record(source.name), "skip")
    placed.flush()
    placed.flush()
    assert len(Path("p/metadata.jsonl").read_bytes().splitlines()) == 2
