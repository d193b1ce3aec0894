"""`dbcap runs`: its commands as users type them; what they tell is tested with dbcap.run_reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dbcap import runs

ROW = "step,loss,instance,prior\n1,0.3,0.1,0.2\n2,0.5,0.2,0.3\n"


def rows(result):
    return [line.split("\t") for line in result.out.splitlines()]


@pytest.fixture
def run(write_run, write_checkpoint, monkeypatch):
    """An interrupted run with two checkpoints."""
    monkeypatch.setenv("TZ", "UTC")
    run = write_run(status="running", step=200, best={"step": 100, "value": 0.125})
    write_checkpoint(run, 100, best=True)
    write_checkpoint(run, 200)
    run.metrics.write_text(ROW)
    return run


def test_the_list(cli, run):
    ((name, status, steps, method, model, changed, size),) = rows(cli("runs", "list"))
    assert (name, status, steps, method, model) == (
        "dog-1",
        "interrupted (nobody trains it)",
        "200/400",
        "full",
        "starter",
    )
    assert changed.startswith("2026-11-25 ")
    assert size.endswith((" bytes", " kB"))
    (found,) = json.loads(cli("runs", "list", "--json").out)
    assert (found["status"], found["note"], found["steps"]) == ("interrupted", "nobody trains it", 400)
    assert (found["changed"], found["folder"]) == ("2026-11-25T12:00:00+00:00", str(run.folder))
    with run.lock():
        assert rows(cli("runs", "list"))[0][1] == "running"


def test_no_runs(cli):
    assert cli("runs", "list") == (0, "", "there are no runs; `dbcap train` makes one\n")
    assert cli("runs", "list", "--json").out == "[]\n"


def test_all_about_one(cli, run):
    result = cli("runs", "show", "dog-1")
    assert (result.code, result.err) == (0, "next: dbcap resume dog-1\n")
    found = rows(result)
    for row in (
        ["status", "interrupted (nobody trains it)"],
        ["step", "200 of 400"],
        ["model", "starter"],
        ["identifier", "sks"],
        ["best", "0.125 at step 100"],
        ["last loss", "0.5"],
        ["folder", str(run.folder)],
        ["100", "2 bytes", "best"],
        ["200", "2 bytes", ""],
        ["lr", "1e-05"],
    ):
        assert row in found
    told = json.loads(cli("runs", "show", "dog-1", "--json").out)
    assert [one["step"] for one in told["checkpoints"]] == [100, 200]
    assert (told["base"]["model"], told["status"]) == ("starter", "interrupted")


def test_where_things_are(cli, run):
    assert cli("runs", "path", "dog-1") == (0, f"{run.folder}\n", "")
    assert cli("runs", "path", "dog-1", "--checkpoint", "best").out == f"{run.checkpoints / '000100'}\n"
    assert cli("runs", "path", "dog-1", "--checkpoint", "last").out == f"{run.checkpoints / '000200'}\n"
    assert cli("runs", "path", "dog-1", "--checkpoint", "100").out == f"{run.checkpoints / '000100'}\n"
    unfinished = cli("runs", "path", "dog-1", "--final")
    assert (unfinished.code, "run:dog-1@last is its newest checkpoint, of step 200" in unfinished.error) == (1, True)
    run.update(status="finished")
    run.final.mkdir()
    assert cli("runs", "path", "dog-1", "--final").out == f"{run.final}\n"


def test_runs_are_removed(cli, run, write_run):
    write_run("cat-1")
    write_run("cat-2")
    code, out, err = cli("runs", "rm", "cat-1", "dog-1", "cat-1")
    assert (code, out) == (0, "")
    assert [line.partition(",")[0] for line in err.splitlines()] == [
        "the run cat-1 is removed",
        "the run dog-1 is removed",
    ]
    assert [one.name for one in runs.every()] == ["cat-2"]


def test_a_run_that_is_trained_keeps_the_others_too(cli, run, write_run):
    write_run("cat-1")
    with run.lock():
        result = cli("runs", "rm", "cat-1", "dog-1")
    assert (result.code, result.error) == (4, "the run dog-1 is being trained; stop that first, with Ctrl-C")
    assert cli("runs", "rm", "cat-1", "dgo-1").error == "there is no run dgo-1; did you mean dog-1?"
    assert {one.name for one in runs.every()} == {"cat-1", "dog-1"}


def test_a_plot(cli, run):
    assert cli("runs", "plot", "dog-1") == (0, "dog-1.png\n", "")
    assert cli("runs", "plot", "dog-1", "-o", "loss.png").out == "loss.png\n"
    assert Path("loss.png").read_bytes() == Path("dog-1.png").read_bytes()
    Path("loss.png").write_bytes(b"mine")
    result = cli("runs", "plot", "dog-1", "-o", "loss.png")
    assert (result.code, result.error) == (
        2,
        "loss.png is there, and is no plot of dbcap's; choose another name, with -o FILE",
    )


def test_a_damaged_run_is_listed_and_removed(cli, run):
    (run.folder / runs.MANIFEST).write_text("{")
    assert rows(cli("runs", "list"))[0][1].startswith("damaged (")
    for verb in ("show", "plot"):
        result = cli("runs", verb, "dog-1")
        assert (result.code, "`dbcap runs rm dog-1` removes the run" in result.error) == (1, True)
    assert cli("runs", "rm", "dog-1").code == 0
    assert runs.every() == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["show", "dgo-1"], 2, "there is no run dgo-1; did you mean dog-1?"),
        (["path", "../dog-1"], 2, "there is no run ../dog-1; did you mean dog-1?"),
        (["path", "dog-1", "--checkpoint", "150"], 2, "the run dog-1 has no checkpoint 150; there are 100, 200"),
        (["path", "dog-1", "--checkpoint", "x"], 2, "the run dog-1 has no checkpoint x; there are 100, 200"),
        (["path", "dog-1", "--checkpoint", "1", "--final"], 2, "--final and --checkpoint exclude each other"),
        (["rm"], 2, "missing argument 'NAME'"),
    ],
)
def test_mistakes_are_one_line(cli, run, words, code, message):
    result = cli("runs", *words)
    assert (result.code, message in result.error) == (code, True)


def test_looking_at_runs_loads_no_torch(cli, run, process):
    for words in (["list"], ["show", "dog-1"], ["plot", "dog-1"]):
        done = process("runs", *words, env={"PYTHONPROFILEIMPORTTIME": "1"})
        assert done.code == 0
        names = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.err.splitlines()}
        assert "dbcap" in names
        assert not names & {"torch", "transformers", "diffusers", "lightning"}


def test_names_are_completed(cli, run, process):
    env = {"_DBCAP_COMPLETE": "complete_bash", "COMP_WORDS": "dbcap runs show d", "COMP_CWORD": "3"}
    assert process(env=env).out.split() == ["dog-1"]
