"""What need not be made again: what a kill, a deletion or a stranger does to the folder, an image is found or made."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from dbcap.errors import DbcapError
from dbcap.files import write_atomic
from dbcap.generation import pictures
from dbcap.generation.jobs import Job
from dbcap.generation.manifest import NAME, Manifest

PIXELS = np.zeros((2, 2, 3), np.uint8)
BARE = pictures.encoded(PIXELS, "png", "", {})
"""An image that says nothing of itself."""


def job(seed: int) -> Job:
    return Job("ab" * 32, "a cat", "", seed, 8, 8, "ddim", 5, 7.5)


def key(seed: int) -> str:
    return job(seed).key


def picture(path: Path, seed: int) -> Path:
    """Write an image that says which job's it is."""
    kind = {".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}.get(path.suffix.lower(), "png")
    facts = {"key": key(seed), "job": dataclasses.asdict(job(seed))}
    write_atomic(path, pictures.encoded(PIXELS, kind, "text", facts))
    return path


def make(manifest: Manifest, folder: Path, seed: int, name: str = "") -> Path:
    """Make an image as a run does: first it, then its line."""
    path = picture(folder / (name or f"{seed:05d}.png"), seed)
    manifest.add(key(seed), path.name, {"job": dataclasses.asdict(job(seed)), "seconds": 1.5})
    return path


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines()]


@pytest.fixture
def out(tmp_path) -> Path:
    """A folder with the images of seeds 0, 1 and 2."""
    manifest = Manifest(tmp_path)
    for seed in range(3):
        make(manifest, tmp_path, seed)
    return tmp_path


def found(folder: Path, seeds: int = 3) -> list[str | None]:
    manifest = Manifest(folder)
    paths = [manifest.find(key(seed)) for seed in range(seeds)]
    assert all(path is None or path.parent == folder for path in paths)
    return [path and path.name for path in paths]


NAMES = ["00000.png", "00001.png", "00002.png"]


# ---- what was made is found


def test_images_are_found_by_key(out):
    assert found(out, 4) == [*NAMES, None]
    manifest = Manifest(out)
    assert manifest.taken("00000.png")
    assert manifest.taken(NAME)
    assert not manifest.taken("00003.png")


def test_a_line_says_all_about_its_image(out):
    first = lines(out)[0]
    assert list(first)[:2] == ["key", "file"]
    assert first == {
        "key": key(0),
        "file": "00000.png",
        "job": {**dataclasses.asdict(job(0)), "additions": []},
        "seconds": 1.5,
    }
    assert (out / NAME).read_bytes().count(b"\n") == 3


def test_what_is_added_is_found_at_once(tmp_path):
    manifest = Manifest(tmp_path)
    assert manifest.find(key(0)) is None
    path = make(manifest, tmp_path, 0)
    assert manifest.find(key(0)) == path
    path.unlink()
    assert manifest.find(key(0)) is None


def test_an_empty_or_missing_folder_holds_nothing(tmp_path):
    assert found(tmp_path) == found(tmp_path / "none") == [None] * 3
    assert not (tmp_path / NAME).exists()
    (tmp_path / "file").touch()
    assert found(tmp_path / "file") == [None] * 3


def test_awkward_names_and_texts(tmp_path):
    manifest = Manifest(tmp_path)
    name = 'é 犬 "x" \u2028.png'
    picture(tmp_path / name, 0)
    manifest.add(key(0), name, {"prompt": "a\nb\r\u2028\x85", "model": "caf\udce9"})
    assert found(tmp_path, 1) == [name]
    (line,) = (tmp_path / NAME).read_bytes().split(b"\n")[:-1]
    assert json.loads(line)["prompt"] == "a\nb\r\u2028\x85"
    assert json.loads(line)["model"] == "caf\udce9"
    assert "犬".encode() in line


# ---- lines that were cut short, or are no lines


@pytest.mark.parametrize("length", [*range(1, 40, 3), 100, 300])
def test_wherever_the_last_line_is_cut(out, length):
    for seed in range(3):  # without what images say themselves
        (out / NAMES[seed]).write_bytes(BARE)
    path = out / NAME
    os.truncate(path, path.stat().st_size - length)
    assert found(out) == ([*NAMES] if length == 1 else [*NAMES[:2], None])
    make(Manifest(out), out, 2)
    make(Manifest(out), out, 3)
    assert found(out, 4) == [*NAMES, "00003.png"]
    assert json.loads(path.read_bytes().splitlines()[-1])["file"] == "00003.png"


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\0" * 600,
        b"\xff\xfe",
        b"{",
        b"[]",
        b"5",
        b"null",
        b'"text"',
        b"[" * 100_000,
        b"9" * 5000,
        b'{"key": "x"}',
        b'{"key": "x", "file": null}',
        b'{"key": ["x"], "file": "a.png"}',
        b'{"key": "x", "file": "../up.png"}',
        b'{"key": "x", "file": "sub/a.png"}',
        b'{"key": "x", "file": "/etc/passwd"}',
        b'{"key": "x", "file": ""}',
        b'{"key": "x", "file": "."}',
        b'{"key": "x", "file": ".."}',
        b'{"key": "x", "file": "sub"}',
        b'{"key": "x", "file": "a\\u0000b"}',
        b'{"key": "x", "file": "\\ud800"}',
        b'{"key": "x", "file": "' + b"y" * 5000 + b'"}',
    ],
)
def test_strange_lines_name_no_image(out, line):
    (out / "sub").mkdir()
    picture(out / "sub" / "a.png", 7)
    picture(out.parent / "up.png", 8)
    sound = (out / NAME).read_bytes()
    (out / NAME).write_bytes(line + b"\n" + sound + line)
    assert found(out) == NAMES
    assert Manifest(out).find("x") is None
    make(Manifest(out), out, 3)
    assert found(out, 4) == [*NAMES, "00003.png"]


def test_a_mark_of_the_byte_order_and_carriage_returns_do_no_harm(out):
    data = (out / NAME).read_bytes()
    (out / NAME).write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"))
    for name in NAMES:
        (out / name).write_bytes(BARE)
    assert found(out) == NAMES


WRITER = textwrap.dedent("""
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from test_manifest import key, make
    from dbcap.generation.manifest import Manifest
    folder = Path(sys.argv[1])
    manifest = Manifest(folder)
    for seed in range(100_000):
        if not manifest.find(key(seed)):
            make(manifest, folder, seed)
            print(seed, flush=True)
""")


def test_a_writer_that_is_killed_and_goes_on(tmp_path):
    for _ in range(3):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(Path(__file__).parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout
            for _ in range(5):
                last = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split()
        assert process.returncode == -signal.SIGKILL
        last = int(rest[-1]) if rest else last
        manifest = Manifest(tmp_path)
        for seed in range(last + 1):
            path = manifest.find(key(seed))
            assert path == tmp_path / f"{seed:05d}.png"
            assert pictures.facts_of(path)
        assert manifest.find(key(last + 2)) is None
    assert last >= 14


# ---- images that were deleted, moved, renamed, replaced


def test_a_deleted_image_counts_no_more(out):
    (out / NAMES[1]).unlink()
    assert found(out) == [NAMES[0], None, NAMES[2]]
    make(Manifest(out), out, 1)
    assert found(out) == NAMES


def test_a_name_that_was_given_to_another_job(out):
    """00001.png was deleted, and another prompt's image took its name: the first job's is missing all the same."""
    (out / NAMES[1]).unlink()
    manifest = Manifest(out)
    make(manifest, out, 9, NAMES[1])
    assert manifest.find(key(1)) is None
    assert manifest.find(key(9)) == out / NAMES[1]
    (out / NAMES[1]).write_bytes(BARE)  # the lines alone say so too
    manifest = Manifest(out)
    assert manifest.find(key(1)) is None
    assert manifest.find(key(9)) == out / NAMES[1]


def test_an_image_that_was_replaced_by_one_of_another_job(out):
    picture(out / NAMES[1], 9)
    assert found(out) == [NAMES[0], None, NAMES[2]]


def test_an_image_without_its_texts_counts_by_its_line(out):
    (out / NAMES[1]).write_bytes(pictures.encoded(PIXELS, "png", "", {}))
    assert found(out) == NAMES


@pytest.mark.parametrize("name", ["moved.png", "moved.webp", "moved.jpg", "moved.JPEG", "MOVED.PNG"])
def test_an_image_that_no_line_names(out, name):
    picture(out / name, 5)
    assert Manifest(out).find(key(5)) == out / name
    picture(out / "other.txt", 6)
    assert Manifest(out).find(key(6)) is None


def test_without_a_manifest_all_are_found(out):
    (out / NAME).unlink()
    assert found(out) == NAMES
    make(Manifest(out), out, 3)
    assert found(out, 4) == [*NAMES, "00003.png"]
    (out / NAME).write_bytes(b"")
    assert found(out, 4) == [*NAMES, "00003.png"]


def test_a_renamed_image_is_found(out):
    (out / NAMES[1]).rename(out / "cat.png")
    assert found(out) == [NAMES[0], "cat.png", NAMES[2]]


def test_images_moved_here_from_another_folder(out, tmp_path_factory):
    here = tmp_path_factory.mktemp("here")
    make(Manifest(here), here, 7)
    for name in NAMES:
        shutil.move(out / name, here)
    assert found(here) == NAMES
    assert found(out) == [None] * 3


def test_a_job_that_was_made_twice(out):
    """Of several images of a job the newest counts, and the others when it is gone."""
    manifest = Manifest(out)
    make(manifest, out, 1, "again.webp")
    assert manifest.find(key(1)) == out / "again.webp"
    assert found(out) == [NAMES[0], "again.webp", NAMES[2]]
    (out / "again.webp").unlink()
    assert manifest.find(key(1)) == out / NAMES[1]
    assert found(out) == NAMES
    picture(out / "copy.png", 1)
    assert found(out) == NAMES
    (out / NAMES[1]).unlink()
    assert found(out) == [NAMES[0], "copy.png", NAMES[2]]


def test_folders_and_links_to_nowhere_are_no_images(out):
    (out / NAMES[0]).unlink()
    (out / NAMES[0]).mkdir()
    (out / NAMES[1]).unlink()
    (out / NAMES[1]).symlink_to("nowhere")
    (out / "folder.png").mkdir()
    os.mkfifo(out / "pipe.png")
    assert found(out) == [None, None, NAMES[2]]
    assert all(Manifest(out).taken(name) for name in [*NAMES, "folder.png", "pipe.png"])


# ---- what cannot be read or written


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is denied to root")
def test_what_is_denied(out):
    for path, why in ((out / NAME, NAME), (out, out.name)):
        mode = path.stat().st_mode
        path.chmod(0)
        try:
            with pytest.raises(
                DbcapError, match=rf"^cannot read .*{why}.*: Permission denied; check its access rights$"
            ):
                Manifest(out)
        finally:
            path.chmod(mode)


def test_what_is_denied_is_one_line(out, monkeypatch):
    """Also where the tests run as root: the system's refusal is what counts."""

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DbcapError) as caught:
        Manifest(out)
    assert str(caught.value) == f"cannot read {out / NAME}: Permission denied; check its access rights"


def test_a_manifest_that_cannot_be_written(tmp_path):
    (tmp_path / NAME).mkdir()
    manifest = Manifest(tmp_path)
    with pytest.raises(IsADirectoryError):
        make(manifest, tmp_path, 0)
    assert found(tmp_path, 1) == ["00000.png"], "it is there, and says so itself"


def test_a_full_disk_leaves_a_manifest_that_goes_on(out, monkeypatch):
    """The system takes half a line and then refuses."""
    manifest = Manifest(out)
    original = os.fsync

    def refuse(file: int) -> None:
        os.ftruncate(file, os.fstat(file).st_size - 50)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        make(manifest, out, 3)
    monkeypatch.setattr(os, "fsync", original)
    make(manifest, out, 4)
    for path in out.glob("*.png"):
        path.write_bytes(BARE)
    assert found(out, 5) == [*NAMES, None, "00004.png"]
