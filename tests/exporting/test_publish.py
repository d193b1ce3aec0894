"""An export appears whole or not at all, and replaces nothing but exports."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from dbcap.errors import DbcapError, LockHeldError, UsageError
from dbcap.exporting.publish import CONTENTS, HEADER, file_for, refuse, whole_file, whole_folder
from dbcap.models.exported import MANIFEST
from dbcap.models.tensors import save_file


def write(out, force=False):
    with whole_folder(out, force) as folder:
        (folder / MANIFEST).write_text(json.dumps({CONTENTS: [MANIFEST, "file"]}))
        (folder / "file").write_text(str(force))


def names(folder):
    return sorted(os.listdir(folder))


def test_a_folder_takes_its_name_at_the_end(tmp_path):
    with whole_folder(tmp_path / "deep" / "e", False) as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "deep" / "e").exists()
    assert names(tmp_path / "deep") == ["e"]


def test_what_is_there_is_refused_and_exports_are_replaced_by_force(tmp_path):
    out = tmp_path / "e"
    write(out)
    with pytest.raises(UsageError, match="is there already"):
        write(out)
    write(out, force=True)
    assert (out / "file").read_text() == "True"
    assert names(tmp_path) == ["e"]


@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("name", ["e", "before"])
def test_what_nothing_replaced_in_the_end_stays(tmp_path, monkeypatch, error, name):
    write(tmp_path / name)
    rename = Path.rename

    def fail(path, to):
        if to == tmp_path / name and not path.name.endswith(".before"):
            raise error
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(type(error)):
            write(tmp_path / name, force=True)
    assert (tmp_path / name / "file").read_text() == "False"
    assert names(tmp_path) == [name]
    write(tmp_path / name, force=True)
    assert (tmp_path / name / "file").read_text() == "True"


def test_what_a_killed_export_was_replacing_comes_back(tmp_path):
    write(tmp_path / "e")
    (tmp_path / ".e.export.tmp").mkdir()
    (tmp_path / "e").rename(tmp_path / ".e.export.tmp" / "e.before")
    with pytest.raises(RuntimeError, match="failed"), whole_folder(tmp_path / "e", True):
        raise RuntimeError("failed")
    assert names(tmp_path) == ["e"]
    assert (tmp_path / "e" / "file").read_text() == "False"


@pytest.mark.parametrize("manifest", ["{}", "[1]", "", '{"contents": []}'])
def test_another_programs_manifest_makes_no_export(tmp_path, manifest):
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / MANIFEST).write_text(manifest)
    with pytest.raises(UsageError, match=r"it has no export\.json of dbcap's"):
        write(tmp_path / "e", force=True)
    assert names(tmp_path / "e") == [MANIFEST]


def test_what_was_put_into_an_export_is_named_and_kept(tmp_path):
    write(tmp_path / "e")
    (tmp_path / "e" / "onnx").mkdir()
    (tmp_path / "e" / "onnx" / "notes").write_text("mine")
    with pytest.raises(UsageError, match="something else than an export: onnx/notes"):
        write(tmp_path / "e", force=True)
    assert (tmp_path / "e" / "onnx" / "notes").read_text() == "mine"


@pytest.mark.parametrize("place", [".", "e/.."])
def test_the_current_folder_is_not_pulled_away(tmp_path, monkeypatch, place):
    write(tmp_path / "e")
    monkeypatch.chdir(tmp_path / "e" if place == "." else tmp_path)
    with pytest.raises(UsageError, match="is the current folder or holds it"):
        write(tmp_path / "e" if place == "." else tmp_path / place, force=True)
    assert names(tmp_path / "e") == [MANIFEST, "file"]


@pytest.mark.parametrize("name", ["bad\udcff", "bad\udcff/e"])
def test_a_name_that_libraries_do_not_take_is_refused_at_once(tmp_path, name):
    with pytest.raises(UsageError, match="is no UTF-8"):
        write(tmp_path / name)
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "other folder", "link"])
def test_force_replaces_nothing_else(tmp_path, kind):
    out = tmp_path / "e"
    if kind == "file":
        out.write_text("mine")
    elif kind == "other folder":
        out.mkdir()
        (out / "mine").write_text("mine")
    else:
        (tmp_path / "target").mkdir()
        out.symlink_to(tmp_path / "target")
    with pytest.raises(UsageError, match=r"--force replaces only exports|something else than an export"):
        write(out, force=True)
    assert names(out) == ["mine"] if kind == "other folder" else out.exists()


def test_an_empty_folder_is_replaced_by_force(tmp_path):
    (tmp_path / "e").mkdir()
    write(tmp_path / "e", force=True)
    assert names(tmp_path / "e") == [MANIFEST, "file"]


def test_a_failure_leaves_what_was_there_and_nothing_beside(tmp_path):
    out = tmp_path / "e"
    write(out)
    with pytest.raises(IsADirectoryError), whole_folder(out, True) as folder:
        folder.write_text("a folder is no file")
    assert (out / "file").read_text() == "False"
    assert names(tmp_path) == ["e"]


def test_what_a_killed_export_left_goes_with_the_next_one(tmp_path):
    (tmp_path / ".e.export.tmp" / "e").mkdir(parents=True)
    (tmp_path / ".e.mine.tmp").mkdir()
    write(tmp_path / "e")
    assert names(tmp_path) == [".e.mine.tmp", "e"]


def test_an_export_leaves_those_with_longer_names_alone(tmp_path):
    with whole_folder(tmp_path / "e.onnx", False) as folder:
        write(tmp_path / "e")
        (folder / "file").write_text("x")
    assert names(tmp_path) == ["e", "e.onnx"]
    assert names(tmp_path / "e.onnx") == ["file"]


def test_two_at_once_lock_each_other_out(tmp_path):
    with whole_folder(tmp_path / "e", False), pytest.raises(LockHeldError):
        write(tmp_path / "e")
    assert names(tmp_path) == ["e"]


def test_a_failure_takes_the_folders_that_it_made_with_it(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "there" / "a" / "b" / "e", False):
        raise ZeroDivisionError
    assert names(tmp_path / "there") == []
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "there" / "e", False):
        raise ZeroDivisionError
    assert names(tmp_path) == ["there"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "source"),
        OSError(errno.EFBIG, "File too large"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_by_what_has_no_room(tmp_path, error):
    with pytest.raises(DbcapError, match=r"^there is no room for .*/e; make room") as caught:  # noqa: SIM117
        with whole_folder(tmp_path / "e", False):
            raise error
    assert caught.value.exit_code == 1
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [PermissionError("no"), SafetensorError("header too large")])
def test_other_failures_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, whole_folder(tmp_path / "e", False):
        raise error
    assert caught.value is error


def test_a_place_below_a_file_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file is no folder"):
        refuse(tmp_path / "file" / "deep" / "e", False)
    assert names(tmp_path) == ["file"]


# ---- one file


@pytest.mark.parametrize(
    ("out", "file"),
    [("x.safetensors", "x.safetensors"), ("x.SafeTensors", "x.SafeTensors"), ("new", "new/m.safetensors")],
)
def test_out_is_the_file_or_the_folder_that_gets_it(tmp_path, monkeypatch, out, file):
    monkeypatch.chdir(tmp_path)
    assert str(file_for(out, "m")) == file
    (tmp_path / "x.safetensors").mkdir()
    assert str(file_for("x.safetensors", "m")) == "x.safetensors/m.safetensors"
    with pytest.raises(UsageError, match=r"x\.ckpt ends in \.ckpt"):
        file_for("x.ckpt", "m")


@pytest.mark.parametrize("header", [{HEADER: "{}"}, {"other": ""}])
def test_force_replaces_files_of_exports_alone(tmp_path, header):
    out = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(1)}, out, header)
    before = out.read_bytes()
    for force, said in ((False, "there already" if HEADER in header else "is no export"), (True, "is no export")):
        if force and HEADER in header:
            with whole_file(out, True) as made:
                made.write_bytes(b"new")
        else:
            with pytest.raises(UsageError, match=said), whole_file(out, force):
                pass
    assert out.read_bytes() == (b"new" if HEADER in header else before)
