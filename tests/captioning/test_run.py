"""`dbcap caption` from arguments to captions: outputs, inputs, failures, exit codes, what is there already."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dbcap_starter
from dbcap.captioning import captioner
from dbcap.captioning.journal import Journal
from dbcap.captioning.run import CaptionReport, image_seed

GOLDEN = Path(__file__).parents[1] / "golden" / "caption"
A, B, C = (
    "a flat drawing of a birthday cake on a pink background",
    "a flat drawing of a blueberries on a brown background",
    "a 3d render of a butterfly on a white background",
)


@pytest.fixture
def no_model(monkeypatch) -> None:
    """Fail where a model is loaded."""

    def load(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(captioner, "load", load)


@pytest.fixture
def web(samples) -> Iterator[str]:
    """The address of a server that has /a.png, /slow.png (which never comes) and nothing else."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/slow"):
                time.sleep(3)
            good = self.path.startswith("/a.png")
            self.send_response(200 if good else 404)
            self.end_headers()
            self.wfile.write(samples[0].read_bytes() if good else b"")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


# ---- golden outputs


@pytest.mark.parametrize(
    ("golden", "words"),
    [
        ("one.txt", ["photos/a.png"]),
        ("one-3.txt", ["photos/a.png", "--num-beams", "4", "--num-captions", "3"]),
        ("folder.txt", ["photos"]),
        ("folder-3.txt", ["photos", "--num-beams", "4", "--num-captions", "3"]),
        ("folder.tsv", ["photos", "--format", "tsv"]),
        ("folder.csv", ["photos", "--format", "csv"]),
        ("folder-3.csv", ["photos", "--format", "csv", "--num-beams", "4", "--num-captions", "3"]),
        ("folder.json", ["photos", "--format", "json"]),
        ("folder-3.json", ["photos", "--format", "json", "--num-beams", "4", "--num-captions", "3"]),
        ("folder.jsonl", ["photos", "--format", "jsonl"]),
        ("folder-3.jsonl", ["photos", "--format", "jsonl", "--num-beams", "4", "--num-captions", "3"]),
        ("metadata.jsonl", ["photos", "--format", "metadata", "-o", "-"]),
    ],
)
def test_golden_bytes_on_stdout_and_in_a_file(golden, words, caption, photos):
    expected = (GOLDEN / golden).read_bytes()
    result = caption(*words)
    assert (result.code, result.err) == (0, "")
    assert result.out == expected
    words = [word for word in words if word not in ("-o", "-")]
    result = caption(*words, "-o", "out")
    assert (result.code, result.out) == (0, b"")
    assert Path("out").read_bytes() == expected
    count = 1 if "one" in golden else 3
    assert result.err == f"{count} captioned, 0 failed: out\n"


@pytest.mark.parametrize(
    ("golden", "options", "name"),
    [
        ("sidecar.txt", ["--format", "sidecar"], "photos/a.txt"),
        ("sidecar.txt", ["--format", "sidecar", "--extension", ".caption"], "photos/a.caption"),
        ("sidecar-3.txt", ["--format", "sidecar", "--num-beams", "4", "--num-captions", "3"], "photos/a.txt"),
        ("a.xmp", ["--format", "xmp"], "photos/a.xmp"),
        ("imagefolder.jsonl", ["--format", "metadata"], "photos/metadata.jsonl"),
    ],
)
def test_golden_bytes_beside_the_images(golden, options, name, caption, photos):
    result = caption("photos", *options)
    assert (result.code, result.out, result.err) == (0, b"", "3 captioned, 0 failed\n")
    assert Path(name).read_bytes() == (GOLDEN / golden).read_bytes()
    assert len(list(photos.iterdir())) == (4 if name.endswith("metadata.jsonl") else 6)


def test_the_fields_of_a_row(caption, photos):
    from dbcap.files import sha256_of

    (row,) = caption("photos/b.png", "--format", "jsonl", "--seed", "7").rows
    assert list(row) == ["path", "sha256", "width", "height", "caption", "captions", "model", "seed"]
    assert row["path"] == "photos/b.png"
    assert row["sha256"] == sha256_of(Path("photos/b.png"))
    assert (row["width"], row["height"], row["caption"], row["model"], row["seed"]) == (64, 64, B, "starter", 7)
    ((candidate),) = row["captions"]
    assert candidate["text"] == B
    assert candidate["score"] == round(candidate["score"], 3) < 0


# ---- which arguments print the path


def test_the_bare_caption_only_for_one_file_or_url(caption, photos, web):
    Path("list").write_text("photos/a.png\n")
    bare, named = f"{A}\n", f"photos/a.png\t{A}\n"
    (photos / "b.png").unlink()
    (photos / "c.png").unlink()
    url = f"{web}/a.png"
    for words, expected in {
        ("photos/a.png",): bare,
        ("photos/a.png", "-H"): named,
        ("photos/a.png", "--with-filename"): named,
        ("photos/a.png", "--format", "tsv"): named,
        ("photos",): named,
        ("photos", "-h"): bare,
        ("photos", "--no-filename"): bare,
        ("photos/*.png",): named,
        ("@list",): named,
        ("-",): named,
        ("photos/a.png", "photos/a.png"): named,
        (url,): bare,
        (url, "-H"): f"{url}\t{A}\n",
    }.items():
        result = caption(*words, stdin=b"photos/a.png\n")
        assert (result.code, result.out.decode()) == (0, expected), words
    result = caption("photos/a.png", "none.png")
    assert (result.code, result.out.decode()) == (3, named)


def test_urls_and_what_is_wrong_with_them(caption, photos, web):
    result = caption(
        f"{web}/a.png?x=1", f"{web}/b.png", "ftp://host/a.png", f"{web}/slow.png", "--url-timeout", "0.5", "-H"
    )
    assert result.code == 3
    assert result.out.decode() == f"{web}/a.png?x=1\t{A}\n"
    failed = [line for line in result.err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 3
    assert f"{web}/b.png: the server answered 404 Not Found" in result.err
    assert "failed: cannot fetch ftp://host/a.png; only http:// and https:// URLs are read" in result.err
    assert "was not fetched within 0.5 seconds" in result.err


def test_passwords_in_urls_are_not_said(caption, web):
    result = caption(f"{web.replace('://', '://me:secret@')}/b.png", "ftp://me:secret@host/x.png")
    assert result.code == 3
    assert "secret" not in result.err
    assert result.err.count("***@") == 2


# ---- inputs


def test_names_with_spaces_newlines_and_bytes_that_are_no_utf8(caption, work, samples):
    names = [b"a b.png", b"c\n\td.png", b"e\xff.png", "é.png".encode()]
    for name in names:
        shutil.copyfile(samples[0], work / os.fsdecode(name))
    result = caption(".", "--format", "tsv")
    assert result.code == 0
    assert result.out == b"".join(b"./" + name + b"\t" + A.encode() + b"\n" for name in sorted(names)).replace(
        b"c\n\td", b"c\\n\\td"
    )
    rows = caption(".", "--format", "jsonl").rows
    assert [os.fsencode(row["path"]) for row in rows] == [b"./" + name for name in sorted(names)]
    listed = caption("-0", "-", "--format", "jsonl", stdin=b"\0".join(names) + b"\0")
    assert [os.fsencode(row["path"]) for row in listed.rows] == names
    assert caption(".", "--format", "sidecar").code == 0
    assert all((work / os.fsdecode(name)).with_suffix(".txt").read_text() == f"{A}\n" for name in names)
    result = caption(".", "--format", "jsonl", "-o", os.fsdecode(b"out \xff\n"), "--resume")
    assert result.code == 0
    assert len((work / os.fsdecode(b"out \xff\n")).read_bytes().splitlines()) == 4
    result = caption(os.fsdecode(b"none\xff\n.png"), "--errors", "errors")
    assert (result.code, result.err.count("\n")) == (3, 2)
    (error,) = [json.loads(line) for line in Path("errors").read_bytes().splitlines()]
    assert os.fsencode(error["path"]) == b"none\xff\n.png"


def test_lists_keep_their_order_and_folders_are_sorted(caption, photos):
    Path("list").write_bytes(b"\xef\xbb\xbfphotos/c.png\r\nphotos/a.png\r\n")
    assert [line.partition("\t")[0] for line in caption("@list", "photos").lines] == [
        "photos/c.png",
        "photos/a.png",
        "photos/b.png",
    ]


def _png(width: int, height: int, body: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@pytest.fixture
def mixed(work, samples) -> Path:
    """A folder of good and bad pictures; the good ones show the first sample."""
    folder = work / "mixed"
    folder.mkdir()
    with Image.open(samples[0]) as opened:
        image = opened.convert("RGB").resize((128, 128))
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    rgba = image.convert("RGBA")
    rgba.save(folder / "rgba.png")
    image.save(folder / "plain.jpg", quality=95)
    image.convert("L").save(folder / "grey.jpg")
    image.quantize(255).save(folder / "palette.png")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.rotate(90).save(folder / "rotated.jpg", exif=exif, quality=95)
    other = Image.new("RGB", image.size)
    image.save(folder / "animated.gif", save_all=True, append_images=[other, other], duration=50)
    Image.new("RGB", (1, 1), (255, 0, 0)).save(folder / "dot.png")
    (folder / "truncated.jpg").write_bytes((folder / "plain.jpg").read_bytes()[:1500])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("This is no picture.")
    (folder / "bomb.png").write_bytes(_png(20_000, 20_000, b"\0" * 100))
    (folder / "notes.txt").write_text("no picture, and none by its name")
    (folder / ".hidden.png").touch()
    return folder


BAD = {"truncated.jpg": "truncated", "empty.png": "empty", "text.png": "not-an-image", "bomb.png": "too-large"}


def test_good_pictures_are_captioned_and_bad_ones_reported(caption, mixed):
    result = caption("mixed", "--format", "jsonl", "--errors", "errors.jsonl")
    assert result.code == 3
    found = {row["path"].removeprefix("mixed/"): row for row in result.rows}
    assert sorted({*found, *BAD, "notes.txt", ".hidden.png"}) == sorted(os.listdir(mixed))
    # all that show the first sample in colour say so
    for name in ("cmyk.jpg", "rgba.png", "plain.jpg", "palette.png", "rotated.jpg", "animated.gif"):
        assert found[name]["caption"] == A, name
    assert (found["dot.png"]["width"], found["dot.png"]["height"]) == (1, 1)
    errors = [json.loads(line) for line in Path("errors.jsonl").read_bytes().splitlines()]
    assert {error["path"].removeprefix("mixed/"): error["kind"] for error in errors} == BAD
    assert all(list(error) == ["path", "kind", "message"] for error in errors)
    failed = [line for line in result.err.splitlines() if line.startswith("failed: mixed/")]
    assert len(failed) == len(BAD)
    assert "left out 1 file that is no picture" in result.err
    assert f"{len(found)} captioned, {len(BAD)} failed" in result.err


def test_transparent_pixels_take_the_colour_asked_for(caption, work):
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save("clear.png")
    for colour in ("white", "black", "#00ff00"):
        Image.new("RGB", (64, 64), colour).save("plain.png")
        one = caption("clear.png", "--alpha", colour, "--format", "jsonl").rows[0]["captions"]
        assert one == caption("plain.png", "--format", "jsonl").rows[0]["captions"]
    assert caption("clear.png", "--alpha", "nocolour").error.startswith("--alpha: 'nocolour' is not allowed")


def test_max_pixels_and_kinds_of_failure(caption, photos):
    result = caption("photos", "--max-pixels", str(64 * 64 - 1))
    assert (result.code, result.out) == (3, b"")
    assert result.err.count("the limit is 4,095") == 3


# ---- exit codes


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["empty"], 0, "empty: nothing to caption there"),
        (["empty", "-r"], 0, "empty: nothing to caption there"),
        (["@none.txt"], 0, "@none.txt: nothing to caption there"),
        (["-"], 0, "-: nothing to caption there"),
        (["none.png"], 3, "failed: no such file: none.png; check the path"),
        (["*.jpg"], 3, "failed: no file matches *.jpg; check the pattern"),
        (["none.png", "*.jpg", "x://y"], 3, "0 captioned, 3 failed"),
        (["@missing.txt"], 2, "error: cannot read the list file missing.txt"),
        (["none.png", "--on-error", "stop"], 1, "error: no such file: none.png; check the path; stopped there"),
    ],
)
@pytest.mark.parametrize("output", [[], ["-o", "out", "--format", "json"], ["--format", "sidecar"]])
def test_what_needs_no_model_loads_none(words, code, line, output, caption, work, no_model):
    Path("empty").mkdir()
    Path("none.txt").touch()
    result = caption(*words, *output)
    assert result.code == code
    assert line in result.err
    assert all(said.count("\n") == 0 for said in result.err.splitlines())
    if output[:1] == ["-o"] and code in (0, 3):
        assert Path("out").read_bytes() == b"[\n]\n"
        assert sorted(os.listdir()) == ["empty", "none.txt", "out"]
    else:
        assert result.out == b""


def test_what_needs_no_model_does_not_even_import_torch(work):
    script = "import sys; from dbcap.cli.app import run; print(run(sys.argv[1:]), 'torch' in sys.modules)"
    words = [sys.executable, "-c", script, "caption", "none.png", "-o", "out"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.stdout == "3 False\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--num-captions", "3"], "--num-captions 3 needs as many beams, and the search has 1"),
        (["--max-length", "65"], "--max-length 65 is beyond the 64 positions of starter; use 64 or less"),
        (["--min-length", "40"], "--min-length 40 is above --max-length 32"),
        (["--prompt", "a photo"], "starter takes no prompt; leave out --prompt"),
        (["--length-penalty", "2"], "--length-penalty needs beams"),
        (["--max-length", "1"], "--max-length 1 leaves no token"),
        (["--top-p", "0.5"], "--top-p needs --sample"),
        (["--format", "jsnol"], "--format jsnol is not known: it must be one of text, tsv, json, jsonl, csv, metadata"),
        (["--format", "sidecar", "-o", "x"], "takes no -o"),
        (["--template", "x"], "--template has no {caption}"),
        (["--replace", "x"], "'x' is not of the form OLD=NEW"),
        (["--resume"], "--resume needs -o FILE"),
        (["-o", "none/out"], "there is no folder"),
        (["-o", "."], ". is a folder"),
        (["-o", ""], "-o '' names no file"),
        (["--device", "cuda:9"], "cuda:9"),
    ],
)
def test_what_cannot_work_is_refused_before_any_image_is_read(words, line, caption, photos):
    Path("photos/0.png").write_text("an image that is read would fail")
    result = caption("photos", *words)
    assert result.code == 2
    assert line in result.error
    assert result.out == b""
    assert "failed:" not in result.err
    assert sorted(os.listdir()) == ["photos"]


def test_a_model_that_cannot_be_loaded_is_exit_1(caption, photos, tmp_path):
    result = caption("photos", "--model", str(tmp_path / "none"))
    assert (result.code, result.out) == (1, b"")
    assert "error: " in result.err
    shutil.copytree(Path(dbcap_starter.__file__).parent / "captioner", tmp_path / "model")
    os.truncate(tmp_path / "model" / "model.safetensors", 5000)
    result = caption("photos", "--model", str(tmp_path / "model"), "-o", "out")
    assert (result.code, result.out) == (1, b"")
    assert "is damaged" in result.error
    assert sorted(os.listdir()) == ["photos"]


def test_on_error_stop_ends_at_the_first_failure(caption, photos):
    Path("photos/b.png").write_text("no picture")
    result = caption("photos", "--on-error", "stop", "--errors", "errors")
    assert (result.code, result.out.decode()) == (1, f"photos/a.png\t{A}\n")
    assert result.error == "photos/b.png: no picture of a known format; stopped there, as --on-error stop says" or (
        result.error.startswith("photos/b.png: ") and result.error.endswith("stopped there, as --on-error stop says")
    )
    assert json.loads(Path("errors").read_text())["path"] == "photos/b.png"


def test_on_error_stop_heeds_what_cannot_be_written_beside(caption, photos):
    (photos / "a.txt").mkdir()  # in the way
    result = caption("photos", "--format", "sidecar", "--existing", "overwrite", "--on-error", "stop")
    assert result.code == 1
    assert "stopped there" in result.error
    result = caption("photos", "--format", "sidecar", "--existing", "overwrite")
    assert result.code == 3
    assert "2 captioned, 1 failed" in result.err
    assert (photos / "b.txt").read_text() == f"{B}\n"


def test_reports_count_right():
    assert CaptionReport().summary == ""
    assert (CaptionReport(5).summary, CaptionReport(5).exit_code) == ("", 0)
    assert (CaptionReport(5, 1).summary, CaptionReport(5, 1).exit_code) == ("5 captioned, 1 failed", 3)
    assert CaptionReport(5, 0, 0, "out").summary == "5 captioned, 0 failed: out"
    assert "2 skipped" in CaptionReport(5, 0, 2).summary
    assert CaptionReport(note="done").summary == "done"


# ---- text around captions


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--prefix", "<", "--suffix", ">"], f"<{B}>"),
        (["--template", "{stem}: {caption} ({stem})"], f"b: {B} (b)"),
        (["--template", "{{caption}} {other}"], f"{{{B}}} {{other}}"),
        (["--replace", "flat=round", "--replace", "round drawing=disc"], B.replace("flat drawing", "disc")),
        (["--replace", " drawing="], B.replace(" drawing", "")),
        (["--replace", "a=b=c"], B.replace("a", "b=c")),
        # first --replace, then --template, then --prefix and --suffix: what is put around is not replaced in
        (["--replace", "a=X", "--template", "a {caption}", "--prefix", "a ", "--suffix", " a"],
         f"a a {B.replace('a', 'X')} a"),
        (["--template", "{caption}", "--prefix", "{stem} {caption} "], f"{{stem}} {{caption}} {B}"),
    ],
)  # fmt: skip
def test_text_around_captions(words, expected, caption, photos):
    assert caption("photos/b.png", *words).lines == [expected]


def test_a_file_name_is_no_template(caption, work, samples):
    shutil.copyfile(samples[1], "{caption}.png")
    assert caption("{caption}.png", "--template", "{stem}|{caption}").lines == ["{caption}|" + B]


def test_every_candidate_is_dressed(caption, photos):
    words = ["--num-beams", "3", "--num-captions", "3", "--prefix", "p ", "--replace", "a=b"]
    lines = caption("photos/b.png", *words).lines
    assert len(lines) == 3
    assert all(line.startswith("p b ") for line in lines)


# ---- what is there already


@pytest.mark.parametrize(
    ("format", "name", "content"),
    [
        ("sidecar", "b.txt", "an old caption\n"),
        ("metadata", "metadata.jsonl", '{"file_name": "b.png", "text": "an old caption", "more": 1}\n'),
        ("xmp", "b.xmp", None),
    ],
)
@pytest.mark.parametrize("existing", [None, "skip", "overwrite", "append", "prepend", "error"])
def test_existing_captions(format, name, content, existing, caption, photos):  # noqa: A002
    if content is None:
        assert caption("photos/b.png", "--format", "xmp", "--template", "an old caption {caption}").code == 0
        content = (photos / name).read_text().replace(f"an old caption {B}", "an old caption")
    (photos / name).write_text(content)
    result = caption("photos", "--format", format, *(["--existing", existing] if existing else []))
    after = (photos / name).read_text()
    expected = {
        "overwrite": B,
        "append": f"an old caption, {B}",
        "prepend": f"{B}, an old caption",
    }.get(existing or "skip", "an old caption")
    assert expected in after
    if expected != "an old caption":
        assert after.count("an old caption") == (existing != "overwrite")
    if existing == "error":
        assert result.code == 2
        assert result.error.startswith("photos/b.png has a caption already; --existing skip, ")
        assert after == content
        assert len(list(photos.iterdir())) == 4, "nothing was written"
        return
    assert (result.code, result.out) == (0, b"")
    skipped = existing in (None, "skip")
    assert ("2 captioned, 0 failed, 1 skipped" in result.err) == skipped
    if format == "metadata":
        rows = [json.loads(line) for line in after.splitlines()]
        assert [row["file_name"] for row in rows] == ["b.png", "a.png", "c.png"]
        assert rows[0]["more"] == 1
    else:
        assert (photos / f"a{Path(name).suffix}").exists()


def test_what_is_there_already_needs_no_model(caption, photos, no_model):
    for name in "abc":
        (photos / f"{name}.txt").write_text("old\n")
    result = caption("photos", "--format", "sidecar")
    assert (result.code, result.out) == (0, b"")
    assert "0 captioned, 0 failed, 3 skipped" in result.err


def test_two_images_that_would_share_a_sidecar_are_refused(caption, photos, no_model):
    shutil.copyfile(photos / "a.png", photos / "a.jpg")
    result = caption("photos", "--format", "sidecar")
    assert result.code == 2
    assert "photos/a.jpg and photos/a.png would share photos/a.txt" in result.error


def test_nothing_can_be_written_beside_a_url(caption, web, no_model):
    result = caption(f"{web}/a.png", "--format", "sidecar")
    assert result.code == 2
    assert "nothing can be written beside" in result.error


def test_a_damaged_metadata_file_is_refused_and_kept(caption, photos, no_model):
    (photos / "metadata.jsonl").write_text("damaged\n")
    result = caption("photos", "--format", "metadata")
    assert result.code == 1
    assert "line 1" in result.error
    assert (photos / "metadata.jsonl").read_text() == "damaged\n"


def test_rows_of_a_metadata_file_elsewhere_are_relative_to_it(caption, photos):
    Path("sets").mkdir()
    assert caption("photos", "--format", "metadata", "-o", "sets/metadata.jsonl").code == 0
    names = [json.loads(line)["file_name"] for line in Path("sets/metadata.jsonl").read_text().splitlines()]
    assert names == ["../photos/a.png", "../photos/b.png", "../photos/c.png"]


# ---- FILE


def test_an_existing_file_is_replaced_only_by_force(caption, photos):
    Path("out").write_text("precious")
    result = caption("photos", "-o", "out")
    assert (result.code, result.error) == (2, "out exists; --force replaces it")
    assert Path("out").read_text() == "precious"
    assert caption("photos", "-o", "out", "--force").code == 0
    assert len(Path("out").read_text().splitlines()) == 3
    assert sorted(os.listdir()) == ["out", "photos"]


def test_a_finished_file_is_left_alone(caption, photos, no_model):
    Path("out").write_text("finished")
    Path("errors").write_text("kept")
    result = caption("photos", "-o", "out", "--resume", "--errors", "errors", "--num-beams", "3")
    assert (result.code, result.err) == (0, "out is finished already, and left as it is\n")
    assert (Path("out").read_text(), Path("errors").read_text()) == ("finished", "kept")


def test_resume_without_anything_starts(caption, photos):
    assert caption("photos", "-o", "out", "--resume").code == 0
    assert len(Path("out").read_text().splitlines()) == 3


def test_a_link_stays_a_link(caption, photos):
    Path("real").mkdir()
    Path("out").symlink_to("real/captions")
    assert caption("photos", "-o", "out").code == 0
    assert Path("out").is_symlink()
    assert len(Path("real/captions").read_text().splitlines()) == 3
    assert os.listdir("real") == ["captions"]


def test_stdout_and_pipes_are_written_straight_through(caption, photos):
    expected = caption("photos").out
    for name in ("-", "/dev/stdout", "/dev/fd/1"):
        assert caption("photos", "-o", name).out == expected
    os.mkfifo("pipe")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(Path("pipe").read_bytes()))
    reader.start()
    result = caption("photos", "-o", "pipe")
    reader.join()
    assert (result.code, result.out, got) == (0, b"", [expected])
    assert sorted(os.listdir()) == ["photos", "pipe"]


def test_a_second_writer_is_turned_away(caption, photos, no_model):
    from dbcap.files import Lock

    with Lock(Path(".out.lock")):
        result = caption("photos", "-o", "out")
    assert result.code == 4
    assert "another dbcap is at work here: it holds" in result.error
    for words in (["-o", "out"], [], ["--format", "sidecar"], ["-o", "-"]):
        with Lock(Path("my.lock")):
            result = caption("photos", "--lock", "my.lock", *words)
        assert result.code == 4, words
    assert not Path("out").exists()


def test_with_a_lock_elsewhere_there_is_none_beside_the_file(caption, photos, monkeypatch):
    from dbcap.captioning import sinks

    seen: list[list[str]] = []
    original = sinks.Resumable.finish

    def finish(self: sinks.Resumable) -> None:
        seen.append(sorted(os.listdir()))
        original(self)

    monkeypatch.setattr(sinks.Resumable, "finish", finish)
    assert caption("photos", "-o", "one").code == 0
    assert caption("photos", "-o", "two", "--lock", "my.lock").code == 0
    assert ".one.lock" in seen[0]
    assert ".two.lock" not in seen[1]
    assert "my.lock" in seen[1]


def test_errors_are_replaced_by_a_new_run(caption, photos):
    Path("errors").write_text("old\n")
    assert caption("photos", "--errors", "errors").code == 0
    assert Path("errors").read_text() == ""
    Path("errors").write_text("old\n")
    assert caption("photos", "--errors", "errors", "--max-length", "999").code == 2
    assert Path("errors").read_text() == "old\n", "a run that is refused replaces nothing"
    assert caption("photos", "--errors", "none/errors").code == 2


@pytest.mark.parametrize("words", [["--errors", "photos/a.png"], ["-o", "photos/a.png", "--force"]])
def test_no_output_is_written_into_an_input(words, caption, photos):
    before = (photos / "a.png").read_bytes()
    result = caption("photos", *words)
    assert result.code == 2
    assert "would write into photos/a.png, which is to be captioned" in result.err
    assert (photos / "a.png").read_bytes() == before


def test_two_outputs_cannot_be_one_file(caption, photos):
    result = caption("photos", "-o", "x", "--errors", "./x")
    assert (result.code, result.err) == (2, "error: -o and --errors name the same file x; name another\n")
    assert not Path("x").exists()


# ---- talk


def test_verbose_says_what_was_chosen_and_why(caption, photos):
    err = caption("photos", "-v").err
    assert re.search(r"^device cpu: .+\ndtype float32: asked for\nbatch size \d+: .+\nthreads \d+: .+$", err, re.M)


def test_quiet_says_only_what_failed(caption, photos):
    Path("photos/b.png").write_text("no picture")
    err = caption("photos", "-q").err
    assert err.startswith("failed: photos/b.png: ")
    assert err.count("\n") == 1


def test_a_closed_stdin_matters_only_to_who_reads_it(caption, photos, monkeypatch):
    from dbcap.cli.app import run

    monkeypatch.setattr(sys, "stdin", None)
    assert run(["caption", "photos"]) == 0
    assert run(["caption", "-"]) == 2


# ---- sampling


def test_sampling_depends_on_seed_and_content_alone(caption, photos, samples):
    words = ["--sample", "--temperature", "3", "--format", "jsonl", "--num-captions", "2"]
    base = {row["sha256"]: row["captions"] for row in caption("photos", *words).rows}
    assert len(base) == 3
    shutil.copyfile(samples[5], "extra.png")
    Path("elsewhere").mkdir()
    shutil.copyfile("photos/c.png", "elsewhere/z.png")
    for other in (
        ["photos/c.png", "photos/a.png", "photos/b.png"],
        ["extra.png", "elsewhere/z.png", "photos"],
        ["photos", "--batch-size", "1"],
        ["photos", "--batch-size", "2", "--workers", "0"],
        ["photos/b.png"],
    ):
        for row in caption(*other, *words).rows:
            if row["path"] != "extra.png":
                assert row["captions"] == base[row["sha256"]], (other, row["path"])
    others = {row["sha256"]: row["captions"] for row in caption("photos", *words, "--seed", "1").rows}
    assert all(others[key] != base[key] for key in base)


def test_seeds_of_images():
    seeds = {image_seed(seed, sha) for seed in (0, 1, 2**64 - 1) for sha in ("0" * 64, "1" * 64)}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert image_seed(0, "0" * 64) == image_seed(0, "0" * 64)


# ---- prompts and other models


def test_prompts_of_blip_and_git(caption, photos, blip_captioner, git_captioner):
    for folder in (blip_captioner, git_captioner):
        result = caption("photos", "-h", "--model", folder, "--prompt", "two cats", "--max-length", "12")
        assert result.code == 0
        assert len(result.lines) == 3
        assert all(line.startswith("two cats") and len(line) > len("two cats") for line in result.lines)
        result = caption("photos", "--model", folder, "--prompt", "a b c d e f g", "--max-length", "8")
        assert result.code == 2
        assert "--prompt has 8 tokens" in result.error


def test_images_that_cannot_share_a_batch(caption, photos, git_captioner, tmp_path):
    shutil.copytree(git_captioner, tmp_path / "model")
    path = tmp_path / "model" / "preprocessor_config.json"
    if not path.exists():
        path = tmp_path / "model" / "processor_config.json"
    config = json.loads(path.read_text())
    (config.get("image_processor") or config)["do_center_crop"] = False
    path.write_text(json.dumps(config))
    Image.new("RGB", (32, 64)).save("photos/d.png")
    result = caption("photos", "--model", tmp_path / "model", "--batch-size", "4")
    assert result.code == 1
    assert "makes images of different shapes: they cannot share a batch; use --batch-size 1" in result.error


def test_plugins_writers_and_captioners(caption, photos, tmp_path, monkeypatch):
    """A captioner of a plugin has no `check`, and may fail in its own ways."""
    from dbcap.plugins import loader

    info = tmp_path / "site" / "dbcap_odd-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dbcap-odd\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dbcap.plugins]\nodd = dbcap_odd:Odd\n")
    (tmp_path / "site" / "dbcap_odd.py").write_text(_ODD)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    loader.reset()
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "odd"}')
    shutil.copyfile(
        Path(dbcap_starter.__file__).parent / "captioner" / "model.safetensors", model / "model.safetensors"
    )
    result = caption("photos", "--model", model, "--format", "shout", "--num-beams", "1")
    assert (result.code, result.err) == (0, "")
    assert result.lines == ["begin", "PHOTOS/A.PNG ODD 0", "PHOTOS/B.PNG ODD 1", "PHOTOS/C.PNG ODD 2", "end False"]
    assert caption("photos", "--model", model, "--prompt", "x").code == 2
    monkeypatch.setenv("ODD", "fails")
    result = caption("photos", "--model", model)
    assert result.code == 1
    assert "the plugin's captioner for models of type odd failed: ZeroDivisionError: by zero" in result.error
    monkeypatch.setenv("ODD", "short")
    result = caption("photos", "--model", model)
    assert result.code == 1
    assert "gave 2 captions for a batch of 3 images" in result.error
    loader.reset()


_ODD = """
import os
import numpy as np
from dbcap.plugins.api import Candidate, Capabilities, Plugin

class Captioner:
    name = "odd"
    capabilities = Capabilities(False, False, False, False, None)
    def __init__(self, folder, device, dtype):
        if os.environ.get("ODD") == "fails":
            raise ZeroDivisionError("by zero")
    def prepare(self, image):
        return np.zeros((3, 2, 2), np.float32)
    def defaults(self):
        return {}
    def generate(self, pixels, options, seeds):
        assert len(pixels) == len(seeds)
        count = len(pixels) - (os.environ.get("ODD") == "short")
        return [[Candidate(f"odd {number}", -1.0)] for number in range(count)]

class Writer:
    def header(self): return b"begin\\n"
    def row(self, record, first): return f"{record.path} {record.caption}\\n".upper().encode()
    def footer(self, empty): return f"end {empty}\\n".encode()

class Odd(Plugin):
    api_version = 1
    def captioners(self): return {"odd": Captioner}
    def writers(self): return {"shout": Writer}
"""


def test_a_journal_of_an_old_run_is_not_mixed_in(caption, photos):
    """A journal without its rows is what a run leaves that was killed as it began or ended."""
    Journal(Path("out")).state.write_text('{"settings": {}, "single": false, "inputs": []}\n')
    assert caption("photos", "-o", "out").code == 0
    assert sorted(os.listdir()) == ["out", "photos"]
