"""Interrupted at any point, in any way, and gone on with: the same bytes as without that. With real processes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dbcap.captioning import captioner
from dbcap.captioning.journal import Journal
from dbcap.inputs import Source

BAD = (3, 17, 24, 25, 26, 27, 28, 29, 51)
COUNT = 60
WORDS = ["many", "--batch-size", "4", "--errors", "errors"]
ROWS, LOG = Path("out.partial"), Path("out.partial.json")


@pytest.fixture(scope="module")
def pictures(samples, tmp_path_factory) -> Path:
    """A folder of 60 pictures, nine of them bad."""
    folder = tmp_path_factory.mktemp("pictures") / "many"
    folder.mkdir()
    for number in range(COUNT):
        shutil.copyfile(samples[number % len(samples)], folder / f"{number:03}.png")
    for number in BAD:
        (folder / f"{number:03}.png").write_text("no picture")
    return folder


@pytest.fixture
def many(work: Path, pictures: Path) -> Path:
    """The folder `many`: hard links to the pictures."""
    folder = work / "many"
    folder.mkdir()
    for path in pictures.iterdir():
        os.link(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def known() -> dict[tuple[str, ...], tuple[bytes, bytes]]:
    """What runs without an interruption have written."""
    return {}


@pytest.fixture
def plain(known, many, caption) -> Callable[..., tuple[bytes, bytes]]:
    """Return a function that gives FILE and the errors of an uninterrupted run with these words."""

    def call(*words: str) -> tuple[bytes, bytes]:
        if words not in known:
            assert caption(*WORDS, *words, "-o", "plain", "--errors", "plain-errors").code == 3
            known[words] = Path("plain").read_bytes(), Path("plain-errors").read_bytes()
            os.unlink("plain")
            os.unlink("plain-errors")
        return known[words]

    return call


def done(name: str = "out") -> int:
    """Return how many inputs the journal of an interrupted run knows as done."""
    journal = Journal(Path(name))
    return journal.read().done if journal.partial.exists() and journal.state.exists() else 0


@pytest.fixture(scope="module")
def left() -> dict[tuple[str, ...], tuple[Path, bytes, bytes]]:
    """What runs that were killed have left: where, FILE.partial and its journal."""
    return {}


@pytest.fixture
def killed(start, many, until, left) -> Callable[..., None]:
    """Return a function that leaves here what a run with these words left that was killed after some images."""

    def call(*words: str) -> None:
        if words not in left:
            running = start(*WORDS, "-o", "out", *words)
            until(lambda: done() >= 20 or not running.alive())
            running.signal(signal.SIGKILL)
            assert running.wait().code == -signal.SIGKILL
            left[words] = Path.cwd(), ROWS.read_bytes(), LOG.read_bytes()
        folder, rows, log = left[words]
        ROWS.write_bytes(rows)
        LOG.write_bytes(log.replace(json.dumps(str(folder)).encode(), json.dumps(str(Path.cwd())).encode()))
        assert 20 <= done() < COUNT
        assert not Path("out").exists()

    return call


# ---- kill -9


@pytest.mark.parametrize(
    "words",
    [
        ["--format", "jsonl"],
        ["--format", "csv", "--num-beams", "3", "--num-captions", "3"],
        ["--format", "json", "--dtype", "bfloat16"],
        ["--format", "jsonl", "--sample", "--temperature", "2"],
        ["--format", "text", "--workers", "0", "--batch-size", "7"],
    ],
    ids=" ".join,
)
def test_killed_anywhere_and_resumed_it_ends_with_the_same_bytes(words, start, plain, until):
    expected = plain(*words)
    chance = random.Random(" ".join(words))
    kills = 0
    while kills < 2 + (words == ["--format", "jsonl"]) and not Path("out").exists():
        running = start(*WORDS, *words, "-o", "out", "--resume")
        goal = done() + chance.randint(0, COUNT // 4)
        until(lambda: done() > goal or not running.alive())  # noqa: B023 - it is called at once
        time.sleep(chance.random() / 50)
        running.signal(signal.SIGKILL)
        kills += running.wait().code == -signal.SIGKILL
    assert kills >= 1
    if not Path("out").exists():
        so_far = done()
        result = start(*WORDS, *words, "-o", "out", "--resume").wait()
        assert (result.code, result.out) == (3, b"")
        assert f"going on with out: {so_far} of {COUNT} are done\n" in result.err
        assert f"{COUNT - len(BAD)} captioned, {len(BAD)} failed: out\n" in result.err
    assert (Path("out").read_bytes(), Path("errors").read_bytes()) == expected
    assert len(expected[1].splitlines()) == len(BAD)
    assert {*os.listdir()} - {".out.lock"} == {"errors", "many", "out"}


def test_killed_before_anything_was_done_it_starts(start, many, caption):
    running = start(*WORDS, "-o", "out")
    running.signal(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    assert caption(*WORDS, "-o", "out", "--resume").code == 3
    assert len(Path("out").read_bytes().splitlines()) == COUNT - len(BAD)


def more(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def less(path: Path, count: int) -> None:
    os.truncate(path, max(0, path.stat().st_size - count))


@pytest.mark.parametrize(
    "damage",
    [
        lambda: more(ROWS, b'{"path": "many/0'),
        lambda: more(ROWS, b"garbage\n" * 1000),
        lambda: less(ROWS, 9),
        lambda: less(ROWS, 10**9),
        lambda: less(LOG, 5),
        lambda: more(LOG, b"\0\0\0\0\n"),
        lambda: (less(ROWS, 300), less(LOG, 300)),
    ],
    ids=["torn row", "garbage", "half a row", "all rows", "torn journal", "zeros", "both"],
)
def test_what_was_torn_is_made_again(damage, killed, caption, plain):
    expected = plain("--format", "jsonl")
    killed("--format", "jsonl")
    damage()
    assert caption(*WORDS, "--format", "jsonl", "-o", "out", "--resume").code == 3
    assert (Path("out").read_bytes(), Path("errors").read_bytes()) == expected


# ---- signals


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_keeps_what_is_done_and_says_how_to_go_on(number, code, word, start, plain, until, caption):
    expected = plain()
    running = start(*WORDS, "-o", "out")
    until(lambda: done() >= 20)
    running.signal(number)
    result = running.wait()
    assert result.code == code
    assert result.error == f"{word}: {done()} of {COUNT} are done; the same command with --resume goes on"
    assert not Path("out").exists()
    assert not Path(".out.lock").exists()
    assert caption(*WORDS, "-o", "out", "--resume").code == 3
    assert (Path("out").read_bytes(), Path("errors").read_bytes()) == expected


@pytest.mark.parametrize("words", [["-o", "out"], [], ["--format", "sidecar"]])
def test_a_reader_that_hangs_does_not_hold_up_the_end(words, start, photos, until):
    """A pipe that nobody writes to is read for ever, as from a server that has stopped talking."""
    os.mkfifo("pipe")
    running = start("photos/a.png", "pipe", "photos/b.png", "--batch-size", "1", *words)
    until(lambda: done() == 1 or running.said() or Path("photos/a.txt").exists())
    running.signal(signal.SIGINT)
    began = time.monotonic()
    result = running.wait(20)
    assert result.code == 130
    assert time.monotonic() - began < 8
    assert " of 3 are done" in result.err
    assert ("--resume" in result.err) == (words[:1] == ["-o"])


def test_a_signal_before_anything_is_done_leaves_nothing(start, photos, until):
    os.mkfifo("pipe")
    running = start("pipe", "photos", "--batch-size", "1", "-o", "out")
    until(ROWS.exists)
    time.sleep(0.3)  # it has begun to wait for the pipe
    running.signal(signal.SIGTERM)
    result = running.wait()
    assert result.code == 143
    assert result.error == "terminated: 0 of 4 are done"
    assert sorted(os.listdir()) == ["photos", "pipe"]


def test_captions_beside_images_are_kept_at_a_signal(start, many, until, caption):
    running = start("many", "--format", "metadata", "--batch-size", "4")
    time.sleep(0.8)
    running.signal(signal.SIGTERM)
    first = running.wait()
    result = caption("many", "--format", "metadata")
    assert result.code == 3
    rows = [json.loads(line) for line in Path("many/metadata.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["file_name"] for row in rows}) == COUNT - len(BAD)
    if first.code == 143 and " of 60 are done" in first.err:
        assert "skipped" in result.err or first.err.startswith("0 of")


# ---- other settings


def test_other_settings_are_refused_and_nothing_is_lost(killed, caption, plain, tiny_captioner, monkeypatch):
    expected = plain("--format", "jsonl")
    killed("--format", "jsonl")
    before = Path("out.partial").read_bytes(), Path("out.partial.json").read_bytes()
    words = [*WORDS, "--format", "jsonl", "-o", "out", "--resume"]
    for change, line in (
        (["--model", str(tiny_captioner)], f"has model starter, this one {tiny_captioner}"),
        (["--dtype", "bfloat16"], "has dtype float32, this one bfloat16"),
        (["--batch-size", "5"], "has batch size 4, this one 5"),
        (["--num-beams", "4"], "has num_beams 1, this one 4"),
        (["--max-length", "20"], "has max_length 32, this one 20"),
        (["--sample"], "has sample False, this one True"),
        (["--seed", "9"], "has seed 0, this one 9"),
        (["--prefix", "a "], "has prefix '', this one a "),
        (["--replace", "a=b"], "has replace [], this one ['a=b']"),
        (["--format", "csv"], "has format jsonl, this one csv"),
        (["--alpha", "black"], "has alpha white, this one black"),
        (["extra.png"], "has inputs ['many'], this one ['many', 'extra.png']"),
    ):
        result = caption(*words, *change)
        assert result.code == 2, change
        assert f"--resume: the interrupted run {line}" in result.error
        assert "use the same again, or start over with --force" in result.error
        assert (Path("out.partial").read_bytes(), Path("out.partial.json").read_bytes()) == before
        assert not Path("out").exists()
    Path("elsewhere").mkdir()
    here = Path.cwd()
    monkeypatch.chdir("elsewhere")
    result = caption(*WORDS, "--format", "jsonl", "-o", here / "out", "--resume")
    assert result.code == 2
    assert f"has folder {here}, this one {here}/elsewhere" in result.error
    monkeypatch.chdir(here)
    # what decides none of the bytes may differ
    assert caption(*words, "--workers", "0", "-q", "--url-timeout", "5").code == 3
    assert (Path("out").read_bytes(), Path("errors").read_bytes()) == expected


def test_another_revision_is_refused(killed, caption, many, tmp_path, tiny_captioner):
    shutil.copytree(tiny_captioner, tmp_path / "model")
    killed("--model", str(tmp_path / "model"), "--max-length", "12")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.0}))
    result = caption(*WORDS, "-o", "out", "--model", tmp_path / "model", "--max-length", "12", "--resume")
    assert result.code == 2
    assert "the interrupted run has revision " in result.error


def test_the_batch_shape_is_that_of_the_whole_run(killed, caption, start, many, until):
    """On resume fewer inputs are left than a batch holds: its shape must not shrink to them."""
    shutil.copyfile("many/059.png", "last.png")
    words = ["many", "last.png", "--batch-size", "50", "--format", "jsonl", "--dtype", "bfloat16"]
    assert caption(*words, "-o", "plain", "-q").code == 3
    os.unlink("last.png")
    os.mkfifo("last.png")  # holds it up
    running = start(*words, "-o", "out")
    until(lambda: done() >= 50)
    running.signal(signal.SIGKILL)
    running.wait()
    os.unlink("last.png")
    shutil.copyfile("many/059.png", "last.png")
    assert caption(*words, "-o", "out", "--resume").code == 3
    assert Path("out").read_bytes() == Path("plain").read_bytes()


# ---- without --resume, and --force


def test_an_interrupted_run_is_kept_unless_forced(killed, caption):
    killed()
    before = Path("out.partial").read_bytes()
    result = caption(*WORDS, "-o", "out")
    assert (result.code, result.error) == (2, "out was interrupted; --resume goes on with it, --force starts over")
    assert Path("out.partial").read_bytes() == before
    result = caption(*WORDS, "-o", "out", "--force", "--max-length", "999")
    assert result.code == 2
    assert Path("out.partial").read_bytes() == before, "what is refused destroys nothing"
    result = caption(*WORDS, "-o", "out", "--force", "--prefix", "new ")
    assert result.code == 3
    lines = Path("out").read_text().splitlines()
    assert len(lines) == COUNT - len(BAD)
    assert all("\tnew " in line for line in lines)
    assert not Path("out.partial").exists()
    assert not Path("out.partial.json").exists()


def test_a_forced_run_that_is_interrupted_keeps_the_old_file(start, many, until, caption):
    Path("out").write_text("old\n")
    running = start(*WORDS, "-o", "out", "--force")
    until(lambda: done() >= 20)
    running.signal(signal.SIGKILL)
    running.wait()
    assert Path("out").read_text() == "old\n"
    assert caption(*WORDS, "-o", "out", "--resume").code == 3
    assert len(Path("out").read_text().splitlines()) == COUNT - len(BAD)


# ---- inputs


def test_the_inputs_are_those_of_the_start(killed, caption, samples, plain):
    expected = plain()
    killed()
    shutil.copyfile(samples[0], "many/000a.png")
    shutil.copyfile(samples[0], "many/zzz.png")
    assert caption(*WORDS, "-o", "out", "--resume").code == 3
    assert Path("out").read_bytes() == expected[0]


def test_a_list_on_stdin_is_not_asked_for_again(start, many, until, caption, monkeypatch):
    names = b"".join(b"many/%03d.png\n" % number for number in reversed(range(COUNT)))
    Path("list").write_bytes(names)
    assert caption("-", "--batch-size", "4", "-o", "plain", stdin=names).code == 3
    running = start("@list", "--batch-size", "4", "-o", "out")
    until(lambda: done() >= 20)
    running.signal(signal.SIGKILL)
    running.wait()
    # as if the list had been on stdin, which a forked process does not have here
    state = Path("out.partial.json")
    state.write_bytes(state.read_bytes().replace(b'"inputs":["@list"]', b'"inputs":["-"]'))
    assert caption("-", "--batch-size", "4", "-o", "out", "--resume", stdin=b"").code == 3
    assert Path("out").read_bytes() == Path("plain").read_bytes()


def test_on_error_stop_can_be_gone_on_with(caption, photos, samples):
    for name, sample in zip("defgh", samples[3:], strict=False):
        shutil.copyfile(sample, photos / f"{name}.png")
    words = [*(f"photos/{name}.png" for name in "abcdefgh"), "--batch-size", "3", "--format", "jsonl"]
    assert caption(*words, "-o", "plain").code == 0
    shutil.move("photos/e.png", "e.png")
    shutil.copyfile("photos/h.png", "h.png")
    Path("photos/h.png").write_text("no picture")
    for _ in range(2):
        result = caption(*words, "-o", "out", "--on-error", "stop", "--errors", "errors", "--resume")
        assert result.code == 1
        assert "no such file: photos/e.png" in result.error
        assert "--on-error stop says; the same command with --resume goes on from there" in result.error
        assert done() == 3
        assert [json.loads(line)["kind"] for line in Path("errors").read_text().splitlines()] == ["missing"]
    shutil.move("e.png", "photos/e.png")
    result = caption(*words, "-o", "out", "--on-error", "stop", "--errors", "errors", "--resume")
    assert result.code == 1
    assert result.error.startswith("photos/h.png: ")
    assert done() == 6
    shutil.move("h.png", "photos/h.png")
    assert caption(*words, "-o", "out", "--on-error", "stop", "--errors", "errors", "--resume").code == 0
    assert Path("out").read_bytes() == Path("plain").read_bytes()
    assert Path("errors").read_text() == ""


def test_after_a_stop_it_may_skip(caption, photos):
    Path("photos/b.png").write_text("no picture")
    words = ["photos", "--batch-size", "1"]
    assert caption(*words, "-o", "plain").code == 3
    assert caption(*words, "-o", "out", "--on-error", "stop").code == 1
    assert caption(*words, "-o", "out", "--resume").code == 3
    assert Path("out").read_bytes() == Path("plain").read_bytes()


def test_failures_alone_are_gone_on_with_without_a_model(caption, work, monkeypatch):
    def load(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(captioner, "load", load)
    names = [f"none{number}.png" for number in range(600)]
    words = [*names, "--errors", "errors", "--format", "csv"]
    assert caption(*words, "-o", "plain").code == 3
    plain = Path("errors").read_bytes()
    journal = Journal(Path("out"))
    from dbcap.inputs import discover

    found = discover(names)
    journal.start({}, found.sources, found.single)
    failures = [(source.name, source.error.kind, str(source.error)) for source in found.sources if source.error]
    journal.commit(b"path,caption\n", 257, failures[:257])
    journal.close()
    Path("none500.png").touch()  # too late: a run that never had a model has no settings to compare with
    result = caption(*words, "-o", "out", "--resume")
    assert result.code == 3
    assert "going on with out: 257 of 600 are done" in result.err
    assert "0 captioned, 600 failed: out" in result.err
    assert Path("out").read_bytes() == Path("plain").read_bytes() == b"path,caption\n"
    assert Path("errors").read_bytes() == plain


def test_killed_after_the_last_batch_it_is_finished(caption, photos):
    """All rows are there, only the name is missing; even so another model is refused."""
    words = ["photos", "--format", "json"]
    assert caption(*words, "-o", "out").code == 0
    plain = Path("out").read_bytes()
    from dbcap.captioning import sinks

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sinks.Resumable, "finish", interrupted)
        result = caption(*words, "-o", "again")
    assert result.code == 130
    assert "3 of 3 are done" in result.err
    assert caption(*words, "-o", "again", "--resume", "--num-beams", "2").code == 2
    result = caption(*words, "-o", "again", "--resume")
    assert result.code == 0
    assert "going on with again: 3 of 3 are done" in result.err
    assert "3 captioned, 0 failed: again" in result.err
    assert Path("again").read_bytes() == plain


# ---- two at once


def test_a_second_process_is_turned_away_until_the_first_is_dead(start, photos, until):
    os.mkfifo("pipe")  # holds the first one up
    words = ["photos", "pipe", "-o", "out", "--batch-size", "1", "--resume"]
    first = start(*words)
    until(lambda: done() == 3)
    second = start(*words).wait()
    assert second.code == 4
    assert "another dbcap is at work here" in second.error
    assert start("photos/a.png", "-o", "out", "--force", "--lock", ".out.lock").wait().code == 4
    first.signal(signal.SIGKILL)
    first.wait()
    os.unlink("pipe")
    third = start(*words).wait()
    assert third.code == 3, "the lock went with the process; the pipe is gone, which is a failed input"
    assert len(Path("out").read_text().splitlines()) == 3


# ---- no room


def test_a_full_disk_is_one_line_and_can_be_gone_on_from(start, plain, caption):
    words = [*WORDS, "--format", "jsonl"]
    expected = plain("--format", "jsonl")
    size = len(expected[0])
    for most in (size // 3, size // 2):
        result = start(*words, "-o", "out", "--resume", most=most).wait()
        assert result.code == 1
        assert "cannot write " in result.error
        assert (
            "out.partial: File too large; once that is mended, the same command with --resume goes on" in result.error
        )
        assert "Traceback" not in result.err
        assert 0 < done() < COUNT
        assert not Path("out").exists()
    assert caption(*words, "-o", "out", "--resume").code == 3
    assert (Path("out").read_bytes(), Path("errors").read_bytes()) == expected


def test_sources_are_those_of_inputs():
    """The journal packs every field of a source: one that is added must be added there."""
    assert Source.__slots__ == ("name", "root", "is_url", "error")
