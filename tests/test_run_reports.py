"""What is told of runs: by manifests and folders as training leaves them, whole or damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dbcap import plotting, run_reports, runs
from dbcap.errors import DbcapError, UsageError
from dbcap.run_reports import details, metrics, overview, pictures, when

HEAD = "step,loss,instance,prior,lr,grad_norm,seconds,validation,validation_instance,validation_prior\n"


@pytest.fixture
def run(write_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_run()


def measured(run, text):
    run.metrics.write_text(HEAD + text)
    return metrics(run)


def test_the_list(write_run):
    write_run("a", status="running", step=7, steps=100, method="lora", model="org/name")
    write_run("b")
    (write_run("c").folder / runs.MANIFEST).write_text("{")
    found = {report.name: report for report in overview()}
    assert [(r.status, r.note, r.step, r.steps, r.method, r.model) for r in (found["a"], found["b"])] == [
        ("interrupted", "nobody trains it", 7, 100, "lora", "org/name"),
        ("finished", "", 400, 400, "full", "starter"),
    ]
    assert (found["c"].status, found["c"].step, found["c"].method) == ("damaged", 0, "")
    assert "run.json is damaged" in found["c"].note
    assert found["b"].size == (runs.folder() / "b" / runs.MANIFEST).stat().st_size
    with runs.find("a").lock():
        assert [(r.status, r.note) for r in overview() if r.name == "a"] == [("running", "")]


@pytest.mark.parametrize("said", ['{"status": "failed", "step": 3}', '{"status": "failed", "step": 3, "config": null}'])
def test_a_manifest_that_says_little(run, said):
    (run.folder / runs.MANIFEST).write_text(said)
    (report,) = overview()
    assert (report.status, report.step, report.steps, report.model, report.changed) == ("failed", 3, 0, "", "")
    assert details(run)["status"] == "failed"


def test_before_the_model_was_found_the_one_that_was_asked_for_is_shown(run):
    run.update(status="failed", base=None, data=None)
    assert overview()[0].model == "as it was typed"


def test_all_about_one(run, write_checkpoint):
    write_checkpoint(run, 100)
    write_checkpoint(run, 200, best=True)
    measured(run, "1,0.3,0.1,0.2,1e-5,1,0.5,,,\n2,0.5,0.2,0.3,1e-5,1,0.5,0.4,0.1,0.3\n")
    found = details(run)
    assert found["base"]["model"] == "starter"
    assert [(one["step"], one["best"], one["bytes"]) for one in found["checkpoints"]] == [
        (100, False, 2),
        (200, True, 2),
    ]
    assert (found["last"]["loss"], found["last"]["validation"]) == (0.5, 0.4)
    assert (found["final"], found["folder"], found["samples"]) == (None, str(run.folder), [])
    assert json.loads(json.dumps(found)) == found
    run.final.mkdir()
    assert details(run)["final"] == str(run.final)


def test_the_command_that_comes_next(run, write_checkpoint):
    assert details(run)["next"].endswith("--model run:dog-1")
    run.update(status="running")
    assert details(run)["next"] == "dbcap resume dog-1"
    with run.lock():
        assert details(run)["next"] == "dbcap runs plot dog-1"
        write_checkpoint(run, 100)
        assert details(run)["next"].endswith("--model run:dog-1@last")


def test_times_are_shown_by_the_clock_here(monkeypatch):
    import time

    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        shown = [when(text) for text in ("2026-11-25T12:00:00+00:00", "2026-11-25T21:00:59.5+09:00", "soon", "")]
    finally:
        monkeypatch.undo()
        time.tzset()
    assert shown == ["2026-11-25 21:00", "2026-11-25 21:00", "soon", ""]


# ---- metrics


def test_metrics_are_what_was_measured(run):
    assert metrics(run) == {}
    found = measured(run, "1,0.3,0.1,0.2,1e-5,1,0.5,,,\n2,nan,inf,,1e-5,1,0.5,0.25,,\n")
    assert found["loss"] == [(1, 0.3)]
    assert found["instance"] == [(1, 0.1)]
    assert found["validation"] == [(2, 0.25)]
    assert found["lr"] == [(1, 1e-5), (2, 1e-5)]
    assert "validation_prior" not in found


def test_of_a_line_twice_the_last_counts_and_half_a_line_does_not(run):
    found = measured(run, "2,0.2,,,,,,,,\n1,0.1,,,,,,,,\n2,0.3,,,,,,,,\n3,0.1")
    assert found == {"loss": [(1, 0.1), (2, 0.3)]}


@given(st.text(alphabet='0123456789,.en-"\n\0\x1c x', max_size=200))
def test_nonsense_is_passed_over(tmp_path_factory, text):
    run = runs.Run(tmp_path_factory.mktemp("run"))
    found = measured(run, text)
    assert all(isinstance(step, int) for points in found.values() for step, _ in points)


# ---- pictures and the plot


def sample(run, step, name):
    folder = run.samples / f"{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), "red").save(folder / f"{name}.png")


def test_pictures_are_found_by_name_and_step(run):
    for step in (0, 200):
        for name in ("class-0", "instance-10", "instance-9"):
            sample(run, step, name)
    (run.samples / "notes").mkdir()
    (run.samples / "notes" / "instance-0.png").touch()
    found = pictures(run)
    assert list(found) == ["instance-9", "instance-10", "class-0"]
    assert found["class-0"] == {step: run.samples / f"{step:06d}" / "class-0.png" for step in (0, 200)}
    assert details(run)["samples"] == [0, 200]


def test_the_plot_of_a_run(run):
    run.update(best={"step": 2, "value": 0.3})
    measured(run, "1,0.3,0.1,0.2,1e-5,1,0.5,,,\n2,0.5,0.2,0.3,1e-5,1,0.5,0.3,0.1,0.2\n")
    bare = run_reports.plot(run, "bare.png")
    sample(run, 2, "instance-0")
    path = run_reports.plot(run, None)
    assert path == Path("dog-1.png")
    heights = [Image.open(one).height for one in (bare, path)]
    assert heights[0] + 160 < heights[1]
    assert run_reports.plot(run, None) == path, "a plot goes over a plot"
    seen = run_reports._plot(run)
    assert (seen.title, seen.charts[1].mark) == ("dog-1", (2, 0.3))
    assert seen.subtitle == "finished,  400 of 400 steps,  full on starter,  lr 1e-05,  sks = dog"
    assert [[curve.label for curve in chart.curves] for chart in seen.charts] == [
        ["instance", "class"],
        ["instance", "class", "total"],
    ]


def test_without_a_class_the_subject_is_all(run):
    run.update(identifier=None, **{"class": None})
    measured(run, "1,0.1,0.1,,1e-5,1,0.5,0.3,0.3,\n")
    assert [curve.label for curve in run_reports._plot(run).charts[1].curves] == ["instance"]
    assert run_reports.plot(run, None).is_file()


def test_a_run_that_has_measured_nothing(run):
    with pytest.raises(DbcapError, match="the run dog-1 has measured nothing yet") as failure:
        run_reports.plot(run, None)
    assert failure.value.exit_code == 1
    assert not Path("dog-1.png").exists()


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("plot.jpg", "plot.jpg must end in .png; name it dog-1.png, for example"),
        ("-", "- must end in .png"),
        ("photo.png", "photo.png is there, and is no plot of dbcap's; choose another name, with -o FILE"),
        ("link.png", "link.png is there, and is no plot"),
        ("absent/plot.png", "there is no folder absent; make it, or choose another"),
    ],
)
def test_a_place_that_is_refused(run, output, said):
    measured(run, "1,0.3,0.1,0.2,1e-5,1,0.5,,,\n")
    Path("photo.png").write_bytes(b"mine")
    Path("link.png").symlink_to("nowhere")
    with pytest.raises(UsageError) as failure:
        run_reports.plot(run, output)
    assert str(failure.value).startswith(said)
    assert Path("photo.png").read_bytes() == b"mine"


def test_a_plot_in_another_place(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    measured(run, "1,0.3,0.1,0.2,1e-5,1,0.5,,,\n")
    assert plotting.is_plot(run_reports.plot(run, "~/loss.PNG"))
    assert (tmp_path / "loss.PNG").is_file()
