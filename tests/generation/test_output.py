"""Lines go out in the order of the plan, as soon as they can, whatever the order in which images are made."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbcap.errors import DbcapError
from dbcap.generation import pictures
from dbcap.generation.jobs import Job
from dbcap.generation.output import Printer
from dbcap.generation.plan import Planned

FACTS = {"model": "starter", "device": "cpu", "seconds": 1.5}


def planned(index: int, prompt: str = "a cat") -> Planned:
    return Planned(index, Job("ab" * 32, prompt, "", index, 8, 8, "ddim", 5, 7.5))


def path(index: int) -> Path:
    return Path(f"out/{index}.png")


@pytest.fixture
def said(capfdbinary):
    """Return the lines that have come out since the last call."""

    def lines() -> list[str]:
        out = capfdbinary.readouterr().out
        assert out == b"" or out.endswith(b"\n")
        return [line.decode("utf-8", "surrogateescape") for line in out.split(b"\n")[:-1]]

    return lines


# ---- order


def test_a_line_waits_for_those_before_it(said):
    printer = Printer("paths")
    printer.skipped(planned(0), path(0))
    printer.skipped(planned(3), path(3))
    assert said() == []
    printer.expect(range(6))
    assert said() == ["out/0.png"]
    printer.made(planned(2), path(2), FACTS)
    printer.made(planned(5), path(5), FACTS)
    assert said() == []
    printer.made(planned(1), path(1), FACTS)
    assert said() == ["out/1.png", "out/2.png", "out/3.png"]
    printer.made(planned(4), path(4), FACTS)
    assert said() == ["out/4.png", "out/5.png"]
    printer.close()
    assert said() == []


@pytest.mark.parametrize("order", itertools.permutations(range(4)))
def test_every_order_of_making_prints_the_same(said, order):
    printer = Printer("paths")
    printer.expect(range(4))
    for index in order:
        printer.made(planned(index), path(index), FACTS)
    assert said() == [f"out/{index}.png" for index in range(4)]


def test_all_there_already(said):
    printer = Printer("paths")
    for index in range(3):
        printer.skipped(planned(index), path(index))
    printer.expect(range(3))
    assert said() == ["out/0.png", "out/1.png", "out/2.png"]


def test_an_empty_plan_says_nothing(said):
    printer = Printer("paths")
    printer.expect([])
    printer.close()
    assert said() == []


# ---- failures, and jobs that stand twice


def test_a_failed_one_has_no_line_and_holds_up_nobody(said):
    printer = Printer("paths")
    printer.expect(range(4))
    printer.made(planned(1), path(1), FACTS)
    printer.failed(planned(0))
    assert said() == ["out/1.png"]
    printer.failed(planned(3))
    printer.made(planned(2), path(2), FACTS)
    assert said() == ["out/2.png"]


def test_a_job_that_stands_twice_has_the_line_of_the_first(said):
    printer = Printer("paths")
    for index in (2, 3):
        printer.same(planned(index), 0)
    printer.expect(range(4))
    printer.made(planned(1), path(1), FACTS)
    assert said() == []
    printer.made(planned(0), path(0), FACTS)
    assert said() == ["out/0.png", "out/1.png", "out/0.png", "out/0.png"]


def test_a_job_that_stands_twice_and_fails(said):
    printer = Printer("paths")
    printer.same(planned(1), 0)
    printer.expect(range(3))
    printer.made(planned(2), path(2), FACTS)
    printer.failed(planned(0))
    assert said() == ["out/2.png"]


def test_json_tells_who_was_made_and_who_was_there(said):
    printer = Printer("jsonl")
    printer.same(planned(1), 0)
    printer.expect(range(2))
    printer.made(planned(0), path(0), FACTS)
    first, second = map(json.loads, said())
    assert first == {"path": "out/0.png", **FACTS, "skipped": False}
    assert second == {**first, "skipped": True}


@given(st.permutations(range(8)), st.lists(st.sampled_from(["make", "fail", "skip", "same"]), min_size=8, max_size=8))
def test_whatever_happens_the_order_is_that_of_the_plan(order, fates):
    fates[0] = "make" if fates[0] == "same" else fates[0]
    firsts = [index for index in range(8) if fates[index] in ("make", "fail")]
    out: list[bytes] = []
    expected: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dbcap.generation.output.write_stdout", out.append)
        printer = Printer("paths")
        for index, fate in enumerate(fates):
            first = max((one for one in firsts if one < index), default=None)
            if fate == "skip" or (fate == "same" and first is None):
                fates[index] = "skip"
                printer.skipped(planned(index), path(index))
                expected.append(str(path(index)))
            elif fate == "same":
                printer.same(planned(index), first)
                expected += [str(path(first))] if fates[first] == "make" else []
            elif fate == "make":
                expected.append(str(path(index)))
        printer.expect(range(8))
        for index in order:
            if fates[index] == "make":
                printer.made(planned(index), path(index), FACTS)
            elif fates[index] == "fail":
                printer.failed(planned(index))
        assert b"".join(out).decode().split("\n")[:-1] == expected


# ---- a run that ends early


def test_what_is_known_goes_out_at_the_end(said):
    printer = Printer("paths")
    printer.skipped(planned(4), path(4))
    printer.expect(range(6))
    printer.made(planned(0), path(0), FACTS)
    printer.failed(planned(2))
    printer.made(planned(3), path(3), FACTS)
    assert said() == ["out/0.png"]
    printer.close()
    assert said() == ["out/3.png", "out/4.png"]
    printer.close()
    assert said() == []


# ---- what lines hold


def test_json_of_one_that_was_there_says_what_its_image_knows(said, tmp_path):
    one = planned(0)
    facts = {"key": one.job.key, "job": dataclasses.asdict(one.job), "model": "starter", "dtype": "float32"}
    image = tmp_path / "x.png"
    image.write_bytes(pictures.encoded(np.zeros((2, 2, 3), np.uint8), "png", "text", facts))
    bare = tmp_path / "bare.png"
    bare.touch()
    printer = Printer("jsonl")
    printer.skipped(one, image)
    printer.skipped(planned(1), bare)
    printer.expect(range(2))
    first, second = map(json.loads, said())
    assert next(iter(first)) == "path"
    job = {**dataclasses.asdict(one.job), "additions": []}
    assert first == {"path": str(image), **facts, "job": job, "seconds": None, "skipped": True}
    assert (second["path"], second["key"], second["skipped"]) == (str(bare), planned(1).job.key, True)
    assert second["job"]["seed"] == 1


@pytest.mark.parametrize("prompt", ["é 犬 🐕", "a\nb\r\tc", "\u2028\x85\x1b", '"'])
def test_a_line_is_one_line(said, prompt):
    one = planned(0, prompt)
    for form in ("jsonl", "paths"):
        printer = Printer(form)
        printer.expect([0])
        printer.made(one, Path(f"out/{prompt}.png"), {"job": dataclasses.asdict(one.job)})
        (line,) = said()
        if form == "jsonl":
            assert json.loads(line)["path"] == f"out/{prompt}.png"
            assert json.loads(line)["job"]["prompt"] == prompt
        else:
            assert "\n" not in line
            assert "\t" not in line
        printer.plan(one, "")
        (line,) = said()
        if form == "jsonl":
            assert json.loads(line) == {"key": one.job.key, "job": {**vars(one.job), "additions": []}, "path": None}
        else:
            assert line.split("\t")[:3] == ["0", "8x8", "missing"]
            assert len(line.split("\t")) == 4


def test_a_path_that_is_no_utf_8(said):
    strange = Path(os.fsdecode(b"out\xff/a.png"))
    for form in ("paths", "jsonl"):
        printer = Printer(form)
        printer.expect([0])
        printer.made(planned(0), strange, {})
        (line,) = said()
        assert (line if form == "paths" else json.loads(line)["path"]) == str(strange)
        printer.plan(planned(0), str(strange))
        (line,) = said()
        assert (line.split("\t")[2] if form == "paths" else json.loads(line)["path"]) == str(strange)


def test_the_plan(said):
    printer = Printer("paths")
    printer.plan(planned(3), "out/x.png")
    printer.plan(planned(4), "")
    assert said() == ["3\t8x8\tout/x.png\ta cat", "4\t8x8\tmissing\ta cat"]


# ---- a reader that goes away

CODE = """
import sys
from pathlib import Path
from dbcap.errors import DbcapError
from dbcap.generation.jobs import Job
from dbcap.generation.output import Printer
from dbcap.generation.plan import Planned
printer = Printer("paths")
printer.expect(range(3))
sys.stdin.readline()
try:
    for index in range(3):
        printer.made(Planned(index, Job("m", "p", "", index, 8, 8, "ddim", 5, 7.5)), Path(f"{index}.png"), {})
except (BrokenPipeError, DbcapError) as error:
    print(index, type(error).__name__, error, file=sys.stderr)
"""


def test_a_reader_that_has_gone_is_told_at_once():
    with subprocess.Popen([sys.executable, "-c", CODE], stdin=-1, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout
        process.stdout.close()
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stderr
        assert process.stderr.readline().startswith("0 BrokenPipeError")


def test_a_full_disk_is_one_line(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        printer = Printer("paths")
        printer.expect([0])
        with pytest.raises(DbcapError, match=r"^cannot write to stdout: No space left on device; make room"):
            printer.made(planned(0), path(0), {})
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # so that closing it can write
