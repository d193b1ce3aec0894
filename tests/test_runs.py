"""Run folders: states, checkpoints, which there are, and taking them away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dbcap import runs
from dbcap.config.paths import data_dir
from dbcap.errors import DbcapError, LockHeldError, UsageError

HOLD = """
import sys
from pathlib import Path
from dbcap.runs import Run
with Run(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def refused(call, *words):
    with pytest.raises(DbcapError) as failure:
        call(*words)
    return str(failure.value)


def test_a_killed_run_says_that_it_is_running_and_is_interrupted(write_run):
    run = write_run(status="running")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout.readline() == b"held\n"
        assert run.state(run.read()) == "running"
        child.kill()
    assert run.state(run.read()) == "interrupted"
    assert run.read()["status"] == "running", "nothing was written"
    run.update(status="failed")
    assert run.state(run.read()) == "failed"


def test_a_folder_is_a_checkpoint_when_it_has_a_state(write_run, write_checkpoint):
    run = write_run()
    assert (run.steps(), run.best()) == ({}, None)
    for step in (400, 50, 1_000_000):
        write_checkpoint(run, step, best=step == 50)
    for name in ("000300", ".000400.tmp", "x"):
        (run.checkpoints / name).mkdir()
    (run.checkpoints / ".000400.tmp" / "state.json").touch()
    assert list(run.steps()) == [50, 400, 1_000_000]
    assert run.steps()[1_000_000].name == "1000000"
    assert run.best() == 50
    for which, name in (("best", "000050"), ("last", "1000000"), ("400", "000400"), ("00400", "000400")):
        assert run.checkpoint(which) == run.checkpoints / name


def test_a_link_to_a_checkpoint_that_is_gone_is_no_best_one(write_run, write_checkpoint):
    run = write_run()
    write_checkpoint(run, 50, best=True)
    write_checkpoint(run, 100)
    (run.checkpoints / "000050" / "state.json").unlink()
    assert run.best() is None
    assert refused(run.checkpoint, "best") == "the run dog-1 has no checkpoint best; there are 100"


@pytest.mark.parametrize("which", ["best", "last", "7", "x", "-1", ""])
def test_a_missing_checkpoint_is_named(write_run, which):
    with pytest.raises(UsageError) as failure:
        write_run().checkpoint(which)
    assert str(failure.value) == f"the run dog-1 has no checkpoint {which}; there is none yet"


def test_runs_are_found_by_name_the_last_changed_first(write_run):
    assert runs.every() == []
    for number, name in enumerate(("a", "b", "c")):
        os.utime(write_run(name).folder / runs.MANIFEST, (0, number))
    (runs.folder() / "no-run").mkdir()
    (runs.folder() / "file").touch()
    assert [run.name for run in runs.every()] == ["c", "b", "a"]
    assert runs.find("b").folder == runs.folder() / "b"
    for name in ("no-run", "../runs/b", "", "."):
        assert refused(runs.find, name).startswith(f"there is no run {name}")


# ---- taking them away


def test_a_run_is_removed_and_nothing_else(write_run, write_checkpoint):
    run, other = write_run(), write_run("dog-2")
    write_checkpoint(run, 100)
    outside = data_dir() / "class-images"
    outside.mkdir()
    (outside / "0.png").touch()
    (run.folder / "class").symlink_to(outside)
    size = sum(path.lstat().st_size for path in run.folder.rglob("*") if path.is_file() and not path.is_symlink())
    assert runs.remove(run) == size > 0
    assert [one.name for one in runs.every()] == ["dog-2"]
    assert os.listdir(runs.folder()) == ["dog-2"]
    assert (outside / "0.png").exists()
    assert other.read()["name"] == "dog-2"


def test_a_run_that_somebody_trains_stays(write_run):
    run = write_run()
    with run.lock(), pytest.raises(LockHeldError, match="the run dog-1 is being trained; stop that first, with Ctrl-C"):
        runs.remove(run)
    assert run.read()["name"] == "dog-1"


def test_a_removal_that_was_killed_leaves_no_run_and_is_finished_by_the_next(write_run, monkeypatch):
    run = write_run()

    def killed(_folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            runs.remove(run)
    assert runs.every() == []
    assert os.listdir(runs.folder()) != []
    runs.remove(write_run())
    assert os.listdir(runs.folder()) == []


def test_a_run_that_is_elsewhere_is_left_to_the_user(write_run, tmp_path):
    run = write_run()
    run.folder.rename(tmp_path / "moved")
    run.folder.symlink_to(tmp_path / "moved")
    assert runs.find("dog-1").read()["name"] == "dog-1"
    assert refused(runs.remove, run) == f"{run.folder} is a link to {tmp_path / 'moved'}; remove both yourself"
    assert Path(tmp_path / "moved" / runs.MANIFEST).is_file()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"status": "running"}', '{"status": 1, "step": 1}'])
def test_a_damaged_manifest_is_named(write_run, text):
    run = write_run()
    (run.folder / runs.MANIFEST).write_text(text)
    said = refused(run.read)
    assert said.startswith(f"{run.folder / runs.MANIFEST} is damaged: ")
    assert said.endswith("else `dbcap runs rm dog-1` removes the run, with its checkpoints")
    assert runs.remove(runs.find("dog-1")) == len(text)
