"""An export appears whole or not at all, and replaces nothing but exports."""

from __future__ import annotations

import os

import pytest

from dbcap.errors import LockHeldError, UsageError
from dbcap.exporting.publish import MANIFEST, whole_folder


def write(out, force=False):
    with whole_folder(out, force) as folder:
        (folder / MANIFEST).write_text("{}")
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
    (tmp_path / ".e.1234.tmp" / "e").mkdir(parents=True)
    (tmp_path / ".other.1234.tmp").mkdir()
    write(tmp_path / "e")
    assert names(tmp_path) == [".other.1234.tmp", "e"]


def test_two_at_once_lock_each_other_out(tmp_path):
    with whole_folder(tmp_path / "e", False), pytest.raises(LockHeldError):
        write(tmp_path / "e")
    assert names(tmp_path) == ["e"]
