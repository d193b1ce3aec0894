"""Where captions go, and the failed inputs."""

from __future__ import annotations

import json
import os
import stat
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from dbcap.captioning import sinks
from dbcap.captioning.journal import Journal
from dbcap.captioning.records import LINE_FORMATS, MetadataFolder, Sidecar
from dbcap.errors import DbcapError, LockHeldError, UsageError
from dbcap.files import Lock
from dbcap.inputs import Source
from dbcap.plugins.api import Candidate, Record


def row(name: str, text: str = "two dogs") -> sinks.Row:
    return Source(name), Record(name, "0" * 64, 4, 3, (Candidate(text, -1.0),), "starter", 0)


@pytest.fixture
def stack():
    with ExitStack() as opened:
        yield opened


# ---- streams


def test_a_stream_has_header_rows_and_footer():
    written: list[bytes] = []
    stream = sinks.Stream(LINE_FORMATS["json"](with_path=True, base=Path()), written.append)
    stream.write([], 1, [])
    stream.write([row("a"), row("b")], 3, [])
    stream.write([row("c")], 4, [])
    stream.finish()
    assert [item["path"] for item in json.loads(b"".join(written))] == ["a", "b", "c"]
    assert len(written) == 4, "each batch at once, and nothing for a batch without rows"


@pytest.mark.parametrize(("format", "expected"), [("json", b"[\n]\n"), ("csv", b"path,caption\n"), ("jsonl", b"")])
def test_a_stream_without_rows_is_a_whole_document(format, expected):  # noqa: A002
    written: list[bytes] = []
    stream = sinks.Stream(LINE_FORMATS[format](with_path=True, base=Path()), written.append)
    stream.finish()
    assert b"".join(written) == expected


@pytest.mark.parametrize("name", [None, "-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_names_of_stdout(name, stack, capfdbinary):
    write = sinks.stream_target(name, stack)
    assert write
    write(b"\xff\n")
    assert capfdbinary.readouterr().out == b"\xff\n"


def test_regular_and_new_files_are_no_streams(tmp_path, stack):
    (tmp_path / "old").touch()
    (tmp_path / "link").symlink_to("nowhere")
    assert [sinks.stream_target(str(tmp_path / name), stack) for name in ("old", "new", "link", "no/folder")] == [
        None
    ] * 4


def test_a_pipe_is_written_straight_through(tmp_path, stack):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()))
    reader.start()
    write = sinks.stream_target(str(path), stack)
    assert write
    write(b"x" * 300_000)
    stack.close()
    reader.join()
    assert got == [b"x" * 300_000]
    assert stat.S_ISFIFO(path.stat().st_mode)


@pytest.mark.parametrize("form", ["/dev/fd/{}", "/proc/self/fd/{}"])
def test_an_open_file_is_written_where_it_stands(form, tmp_path, stack):
    with (tmp_path / "log").open("w+b", buffering=0) as file:
        file.write(b"before\n")
        write = sinks.stream_target(form.format(file.fileno()), stack)
        assert write
        write(b"rows\n")
        file.write(b"after\n")
    assert (tmp_path / "log").read_bytes() == b"before\nrows\nafter\n"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "-o '' names no file"),
        (".", ". is a folder; name a file with -o"),
        ("/dev/fd/987", "cannot write /dev/fd/987"),
        ("file/x", "cannot write file/x: Not a directory"),
    ],
)
def test_targets_that_cannot_be(name, words, tmp_path, monkeypatch, stack):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(UsageError, match=words):
        sinks.stream_target(name, stack)


# ---- FILE


def opened(output: Path, stack: ExitStack, *, resume: bool = False, force: bool = False) -> Journal | None:
    return sinks.open_journal(str(output), resume=resume, force=force, locked=False, stack=stack)


def interrupted(output: Path) -> None:
    journal = Journal(output)
    journal.start({}, [Source("a")], single=True)
    journal.close()


@pytest.mark.parametrize(
    ("there", "options", "outcome"),
    [
        ("", {}, "journal"),
        ("", {"resume": True}, "journal"),
        ("", {"force": True}, "journal"),
        ("file", {}, "exists; --force replaces it"),
        ("file", {"resume": True}, "finished"),
        ("file", {"force": True}, "journal"),
        ("partial", {}, "was interrupted; --resume goes on with it, --force starts over"),
        ("partial", {"resume": True}, "journal"),
        ("partial", {"force": True}, "journal"),
        ("file partial", {}, "was interrupted"),
        ("file partial", {"resume": True}, "journal"),
        ("file partial", {"force": True}, "journal"),
        ("rows", {}, "was interrupted"),
        ("state", {}, "journal"),
        ("state", {"resume": True}, "journal"),
        ("file state", {"resume": True}, "finished"),
    ],
)
def test_what_is_there_already(there, options, outcome, tmp_path, stack):
    output = tmp_path / "out"
    if "file" in there:
        output.write_text("finished")
    if "partial" in there:
        interrupted(output)
    if "state" in there:  # a run that was killed as it started, or as it ended
        Journal(output).state.write_text("{}\n")
    if "rows" in there:
        Journal(output).partial.write_text("rows")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if outcome in ("journal", "finished"):
        found = opened(output, stack, **options)
        assert (found is None) == (outcome == "finished")
    else:
        with pytest.raises(UsageError, match=outcome):
            opened(output, stack, **options)
    stack.close()
    if outcome == "finished":
        before.pop("out.partial.json", None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before, "opening changes nothing"


def test_only_one_writer_at_a_time(tmp_path, stack):
    output = tmp_path / "out"
    assert opened(output, stack)
    assert (tmp_path / ".out.lock").exists()
    with ExitStack() as second, pytest.raises(LockHeldError):
        opened(output, second, resume=True)
    stack.close()
    assert not (tmp_path / ".out.lock").exists()
    with ExitStack() as second:
        assert opened(output, second)


def test_a_lock_elsewhere_is_the_only_one(tmp_path, stack):
    stack.enter_context(Lock(tmp_path / "elsewhere"))
    assert sinks.open_journal(str(tmp_path / "out"), resume=False, force=False, locked=True, stack=stack)
    assert sorted(os.listdir(tmp_path)) == ["elsewhere"]


def test_a_link_leads_to_the_file(tmp_path, stack):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real/rows.jsonl")
    journal = opened(tmp_path / "out", stack)
    assert journal
    journal.start({}, [], single=False)
    journal.finish(b"rows\n")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "rows.jsonl").read_bytes() == b"rows\n"


def test_a_missing_folder_is_wrong_usage(tmp_path, stack):
    with pytest.raises(UsageError, match=r"there is no folder .*/none; create it first"):
        opened(tmp_path / "none" / "out", stack)


@pytest.mark.parametrize(("format", "empty"), [("json", b"[\n]\n"), ("csv", b"path,caption\n"), ("jsonl", b"")])
def test_a_resumable_file_has_one_header_and_one_footer(format, empty, tmp_path):  # noqa: A002
    def go(output: Path, batches: list[list[str]], stops: set[int]) -> bytes:
        writer = LINE_FORMATS[format](with_path=True, base=Path())
        sources = [Source(name) for batch in batches for name in batch]
        journal = Journal(output)
        journal.start({}, sources, single=False)
        sink = sinks.Resumable(journal, writer, None)
        done = 0
        for number, batch in enumerate(batches):
            if number in stops:
                sink.close()
                progress = Journal(output).read()
                sink = sinks.Resumable(Journal(output), writer, progress if progress.done else None)
                if not progress.done:
                    journal = Journal(output)
                    journal.start({}, sources, single=False)
                    sink = sinks.Resumable(journal, writer, None)
            rows = [row(name) for name in batch if name != "bad"]
            done += len(batch)
            sink.write(rows, done, [("bad", "k", "m")] * (len(batch) - len(rows)))
        sink.finish()
        return output.read_bytes()

    batches = [["bad"], ["a", "bad"], ["bad", "bad"], ["b", "c"]]
    plain = go(tmp_path / "plain", batches, set())
    for number in range(4):
        assert go(tmp_path / f"one{number}", batches, {number}) == plain
    assert go(tmp_path / "every", batches, {0, 1, 2, 3}) == plain
    assert plain.count(b"path,caption") == (format == "csv")
    assert go(tmp_path / "none", [], set()) == empty
    assert go(tmp_path / "bad", [["bad"], ["bad"]], {1}) == empty


# ---- settings


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ({"num_beams": 1}, {"num_beams": 4}, "the interrupted run has num_beams 1, this one 4"),
        ({"prefix": ""}, {"prefix": "x"}, "has prefix '', this one x"),
        ({"prompt": None}, {"prompt": "a\nb"}, r"has prompt none, this one a\\nb"),
        ({}, {"dtype": "float32"}, "has dtype none, this one float32"),
        ({"inputs": ["a"] * 9999}, {"inputs": ["b"] * 9999}, "has inputs .{100}, this one .{100}; use the same"),
    ],
)
def test_other_settings_are_refused_by_name(old, new, words):
    with pytest.raises(UsageError, match=words) as caught:
        sinks.refuse_other_settings(old, new)
    assert "start over with --force" in str(caught.value)


def test_the_same_settings_are_not_refused():
    settings = {"seed": 1, "replace": ["a=b"], "top_p": 0.1, "prompt": None}
    assert sinks.refuse_other_settings(json.loads(json.dumps(settings)), settings) is None


# ---- beside


def test_what_has_no_place_is_returned(tmp_path):
    good, bad = tmp_path / "a.png", tmp_path / "b.png"
    (tmp_path / "b.txt").mkdir()  # in the way
    sink = sinks.Beside(Sidecar(), "overwrite")
    ((source, error),) = sink.write([row(str(good)), row(str(bad))], 2, [])
    sink.finish()
    assert (source.name, error.kind) == (str(bad), "unwritable")
    assert (tmp_path / "a.txt").read_text() == "two dogs\n"


def test_shared_files_are_put_on_disk_now_and_then(tmp_path, monkeypatch):
    sink = sinks.Beside(MetadataFolder(), "overwrite")
    sink.write([row(str(tmp_path / "a.png"))], 1, [])
    assert not (tmp_path / "metadata.jsonl").exists()
    monkeypatch.setattr(sinks, "FLUSH_SECONDS", 0.0)
    sink.write([row(str(tmp_path / "b.png"))], 2, [])
    assert len((tmp_path / "metadata.jsonl").read_text().splitlines()) == 2
    monkeypatch.setattr(sinks, "FLUSH_SECONDS", 1000.0)
    sink.write([row(str(tmp_path / "c.png"))], 3, [])
    sink.close()
    assert len((tmp_path / "metadata.jsonl").read_text().splitlines()) == 3


# ---- errors


def test_errors_are_lines_and_replaced_when_the_work_begins(tmp_path):
    path = tmp_path / "errors"
    path.write_text("old\n")
    with ExitStack() as stack:
        log = sinks.ErrorLog(str(path), stack)
        assert path.read_text() == "old\n", "a run that is refused destroys nothing"
        log.start([("a\t", "missing", "no such file")])
        log.add((os.fsdecode(b"\xff"), "damaged", "two\nlines"))
        assert [json.loads(line) for line in path.read_bytes().splitlines()] == [
            {"path": "a\t", "kind": "missing", "message": "no such file"},
            {"path": "\udcff", "kind": "damaged", "message": "two\nlines"},
        ]
    with ExitStack() as stack:
        sinks.ErrorLog(str(path), stack).start([])
    assert path.read_bytes() == b""


def test_errors_may_go_to_a_pipe_or_nowhere(tmp_path):
    reading, writing = os.pipe()
    with ExitStack() as stack:
        log = sinks.ErrorLog(f"/dev/fd/{writing}", stack)
        log.start([("a", "b", "c")])
        os.close(writing)
    assert os.read(reading, 1000) == b'{"path": "a", "kind": "b", "message": "c"}\n'
    os.close(reading)
    with ExitStack() as stack:
        sinks.ErrorLog(None, stack).start([("a", "b", "c")])


def test_errors_that_cannot_be_written_are_one_line(tmp_path):
    with ExitStack() as stack, pytest.raises(DbcapError, match=r"cannot write --errors .*/none/e: No such file"):
        sinks.ErrorLog(str(tmp_path / "none" / "e"), stack)
    with ExitStack() as stack, pytest.raises(DbcapError, match="cannot write --errors /dev/full: No space left"):
        sinks.ErrorLog("/dev/full", stack).start([("a", "b", "c")])
