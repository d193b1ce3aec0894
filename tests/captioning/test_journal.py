"""The journal of `-o FILE`: whatever a kill, a full disk or a power cut leaves behind, what is sound is found again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dbcap.captioning.journal import Journal
from dbcap.errors import DbcapError, InputError, UsageError
from dbcap.inputs import Source

SETTINGS = {"model": "starter", "batch size": 2, "prefix": os.fsdecode(b"\xff"), "replace": ["a=b"]}
SOURCES = [
    Source("a.png"),
    Source("photos/b.png", "photos"),
    Source("http://host/c.png", is_url=True),
    Source(os.fsdecode(b"d \n\xff.png"), error=InputError("no such file", "check the path", kind="missing")),
    Source("", error=InputError("an empty name", kind="missing")),
]
FAILURE = (SOURCES[3].name, "missing", "no such file; check the path")


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def interrupted(output) -> Journal:
    """Three batches: one input, two of which one failed, and one."""
    journal = Journal(output)
    journal.start(SETTINGS, SOURCES, single=False)
    journal.commit(b"header\nfirst\n", 1, [])
    journal.commit(b"second\n", 3, [FAILURE])
    journal.commit(b"third\n", 4, [])
    journal.close()
    return journal


def test_everything_is_remembered(interrupted):
    assert interrupted.exists()
    progress = Journal(interrupted.output).read()
    assert progress.settings == SETTINGS
    assert [repr(source) for source in progress.sources] == [repr(source) for source in SOURCES]
    assert progress.single is False
    assert progress.done == 4
    assert progress.size == len(b"header\nfirst\nsecond\nthird\n") == interrupted.partial.stat().st_size
    assert progress.failures == [FAILURE]


def test_going_on_and_finishing(interrupted, output):
    journal = Journal(output)
    journal.go_on(journal.read())
    journal.commit(b"fourth\n", 5, [])
    assert Journal(output).read().done == 5
    assert not output.exists()
    journal.finish(b"footer\n")
    assert output.read_bytes() == b"header\nfirst\nsecond\nthird\nfourth\nfooter\n"
    assert os.listdir(output.parent) == ["out.jsonl"]
    assert not Journal(output).exists()


def test_a_new_run_forgets_the_old_one(interrupted, output):
    journal = Journal(output)
    journal.start({"model": "other"}, SOURCES[:1], single=True)
    journal.close()
    progress = Journal(output).read()
    assert (progress.settings, len(progress.sources), progress.single) == ({"model": "other"}, 1, True)
    assert (progress.done, progress.size, progress.failures) == (0, 0, [])
    assert journal.partial.read_bytes() == b""


@pytest.mark.parametrize(
    "tail",
    [
        b'{"done":5,"bytes":26,"fai',  # torn
        b'{"done":5,"bytes":26,"failed":[]}',  # all but the line end
        b"\0" * 40,
        b"\xff\xfe garbage\n",
        b"17\n",
        b"null\n",
        b"[]\n",
        b'{"done":5}\n',
        b'{"done":"5","bytes":26,"failed":[]}\n',
        b'{"done":5,"bytes":26,"failed":[["name"]]}\n',
        b'{"done":3,"bytes":26,"failed":[]}\n',  # goes back
        b'{"done":99,"bytes":26,"failed":[]}\n',  # more than there are
        b'{"done":5,"bytes":3,"failed":[]}\n',
    ],
)
def test_a_torn_or_strange_last_line_of_the_journal_is_cut(interrupted, output, tail):
    sound = interrupted.state.read_bytes()
    interrupted.state.write_bytes(sound + tail)
    progress = Journal(output).read()
    assert progress.done == 4
    assert progress.failures == [FAILURE]
    journal = Journal(output)
    journal.go_on(progress)
    journal.commit(b"fourth\n", 5, [])
    journal.close()
    assert journal.state.read_bytes().startswith(sound)
    assert all(json.loads(line) for line in journal.state.read_bytes().splitlines())
    assert Journal(output).read().done == 5


@pytest.mark.parametrize("length", range(1, 34))
def test_wherever_the_journal_is_cut_the_last_whole_line_counts(interrupted, output, length):
    last = interrupted.state.read_bytes().splitlines(keepends=True)[-1]
    assert length <= len(last) == len(b'{"done":4,"bytes":26,"failed":[]}\n')
    os.truncate(interrupted.state, interrupted.state.stat().st_size - length)
    progress = Journal(output).read()
    assert (progress.done, progress.size) == (3, len(b"header\nfirst\nsecond\n"))


@pytest.mark.parametrize("garbage", [b"x", b'{"path": "fo', b"whole\n", b"\0" * 5000])
def test_what_stands_behind_the_last_sound_row_is_cut(interrupted, output, garbage):
    with interrupted.partial.open("ab") as file:
        file.write(garbage)
    journal = Journal(output)
    journal.go_on(journal.read())
    journal.finish(b"")
    assert output.read_bytes() == b"header\nfirst\nsecond\nthird\n"


@pytest.mark.parametrize(("lost", "done"), [(1, 3), (7, 1), (13, 1), (14, 0), (26, 0)])
def test_rows_that_are_lost_are_to_be_made_again(interrupted, output, lost, done):
    os.truncate(interrupted.partial, interrupted.partial.stat().st_size - lost)
    progress = Journal(output).read()
    assert progress.done == done
    assert progress.failures == ([FAILURE] if done >= 3 else [])
    journal = Journal(output)
    journal.go_on(progress)
    assert interrupted.partial.stat().st_size == progress.size
    journal.commit(b"again\n", done + 1, [])
    journal.close()
    assert Journal(output).read().done == done + 1


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}\n", b"[]\n", b"null\n", b'{"settings":{},"inputs":[[]],"single":1}\n']
)
def test_a_partial_without_a_journal_is_not_gone_on_with(interrupted, output, content):
    interrupted.state.write_bytes(content)
    with pytest.raises(UsageError, match="missing or damaged; start over with --force"):
        Journal(output).read()
    interrupted.state.unlink()
    assert Journal(output).exists(), "the rows must not be overwritten without being asked"
    with pytest.raises(UsageError, match="missing or damaged"):
        Journal(output).read()


def test_there_is_no_moment_with_a_partial_and_no_journal(interrupted, output, monkeypatch):
    """A run that is killed while it starts leaves something that --resume can deal with."""
    seen: list[tuple[bool, bool]] = []
    original = os.fsync

    def look(file: int) -> None:
        seen.append((interrupted.partial.exists(), interrupted.state.exists()))
        original(file)

    monkeypatch.setattr(os, "fsync", look)
    journal = Journal(output)
    journal.start(SETTINGS, SOURCES, single=False)
    journal.commit(b"first\n", 1, [])
    journal.finish(b"")
    assert len(seen) >= 5
    assert (True, False) not in seen


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    journal = Journal(tmp_path / "none" / "out")
    journal.partial.parent.mkdir()
    journal.partial.mkdir()  # a folder is in the way
    with pytest.raises(DbcapError, match=r"cannot write .*out\.partial: .*; once that is mended") as caught:
        journal.start(SETTINGS, SOURCES, single=False)
    assert not isinstance(caught.value, UsageError)


def test_a_full_disk_is_one_line_and_harms_nothing(interrupted, output):
    """/dev/full stands for the disk: every write to it fails."""
    for which in ("partial", "state"):
        journal = Journal(output)
        progress = journal.read()
        journal.go_on(progress)
        full = os.open("/dev/full", os.O_WRONLY)
        file = journal._rows if which == "partial" else journal._log
        assert file is not None
        os.dup2(full, file._file)
        os.close(full)
        with pytest.raises(DbcapError, match=r"cannot write .*No space left on device; .*--resume goes on"):
            journal.commit(b"x" * 100_000, 5, [])
        journal.close()
        again = Journal(output).read()
        assert (again.done, again.size, again.journal_size) == (progress.done, progress.size, progress.journal_size)
