"""Stopped at any step and gone on with: the same bits as without that. And what is no going on."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dbcap import runs
from dbcap.config.paths import cache_dir
from dbcap.dataset import manifest
from dbcap.models import device
from dbcap.runs import Run
from dbcap.training import checkpoint, preflight

FOUR = ["--steps", "4"]
LORA = ["--method", "lora", "--rank", "2", "--lr", "1e-2"]
OPTIONS = {
    "full": ["--validate-every", "2", "--checkpoint-every", "2"],
    "full, text encoder frozen, prediction": [
        *("--no-train-text-encoder", "--prior", "prediction", "--ema", "--ema-decay", "0.5")
    ],
    "full, bf16, accumulated": ["--precision", "bf16", "--accumulate", "2", "--ema", "--flip"],
    "full, bf16, 8 bits, gradient checkpointing": [
        *("--precision", "bf16", "--optimizer", "adamw8bit", "--gradient-checkpointing", "on")
    ],
    "full, adafactor": ["--optimizer", "adafactor", "--lr", "1e-2"],
    "full, workers, accumulated": ["--workers", "2", "--accumulate", "2", "--batch-size", "2"],
    "lora, noise": [*LORA, "--offset-noise", "0.1", "--min-snr", "5", "--seed", "18446744073709551615"],
    "lora, bf16, prediction, gradient checkpointing": [
        *(*LORA, "--precision", "bf16", "--prior", "prediction", "--gradient-checkpointing", "on")
    ],
    "lora on all layers, no prior": [*LORA, "--targets", "all", "--no-train-text-encoder", "--prior", "none"],
    "embedding, cosine": ["--method", "embedding", "--lr", "1e-2", "--lr-schedule", "cosine", "--warmup", "2"],
}


@pytest.fixture
def rex(training) -> Run:
    """The run that these tests are about, before it is there."""
    return Run(runs.folder() / "rex")


@pytest.fixture
def stopped(training, interrupted, rex):
    """Return a function that gives the run, stopped after step 3 of 4, with checkpoints at steps 2 and 3."""

    def call(*words: str) -> Run:
        interrupted(3, *training.words("rex", *FOUR, "--checkpoint-every", "2", *words))
        return rex

    return call


def manifest_of(run: Run) -> bytes:
    return (run.folder / "run.json").read_bytes()


# ---- the same bits


@pytest.mark.parametrize("words", OPTIONS.values(), ids=OPTIONS)
def test_stopped_twice_it_ends_with_the_same_bits(words, training, straight, interrupted, rex, weights, lines):
    expected = straight(*FOUR, *words)
    interrupted(1, *training.words("rex", *FOUR, *words))
    interrupted(3, "resume", "rex")
    training.resume("rex")
    assert (weights(rex), lines(rex)) == expected


@pytest.mark.parametrize("step", range(1, 6))
def test_at_every_step(step, training, straight, interrupted, rex, weights, lines):
    words = ["--accumulate", "2", "--ema"]
    expected = straight(*words)
    interrupted(step, *training.words("rex", *words))
    training.resume("rex")
    assert (weights(rex), lines(rex)) == expected


def test_each_checkpoint_is_the_one_of_an_uninterrupted_run(training, interrupted, rex):
    words = [*FOUR, "--checkpoint-every", "1", "--keep", "9", "--ema", "--validate-every", "1"]
    other = training.train("other", *words)
    interrupted(2, *training.words("rex", *words))
    training.resume("rex")
    assert rex.best() == other.best()
    for step, folder in other.steps().items():
        hashes = [checkpoint.verified(one)["files"] for one in (folder, rex.steps()[step])]
        assert hashes[0] == hashes[1], step


def test_with_other_workers(training, straight, stopped, weights):
    expected, _ = straight(*FOUR)
    run = stopped()
    training.resume("rex", "--set", "train.workers=1")
    assert weights(run) == expected


def test_time_is_counted_for_each_command(training, straight, rex, weights):
    expected, _ = straight(*FOUR)
    assert training(*training.words("rex", *FOUR, "--max-time", "0s")).code == 5
    assert training("resume", "--max-time", "0s").code == 5
    assert (rex.read()["status"], rex.read()["step"]) == ("out of time", 2)
    training.resume()
    assert weights(rex) == expected
    assert [(one["from"], one["to"]) for one in rex.read()["timings"]] == [(0, 1), (1, 2), (2, 4)]


def test_stopped_while_the_result_is_written(training, straight, rex, monkeypatch, weights):
    from dbcap.training import final

    expected, _ = straight(*FOUR)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(final, "write_full", stop)
        result = training(*training.words("rex", *FOUR))
    assert (result.code, result.error) == (130, "interrupted: step 4 of 4 is kept; `dbcap resume rex` goes on")
    assert rex.read()["status"] == "interrupted"
    training.resume()
    assert weights(rex) == expected
    assert rex.read()["status"] == "finished"


def test_without_the_caches_of_before(training, straight, stopped, weights):
    expected, _ = straight(*FOUR)
    run = stopped()
    shutil.rmtree(cache_dir())
    training.resume()
    assert weights(run) == expected


def test_a_table_and_a_log_that_were_lost(training, stopped, lines):
    run = stopped()
    run.metrics.write_bytes(b"\xff\0")
    shutil.rmtree(run.folder / "tensorboard")
    training.resume()
    assert [line.split(",")[0] for line in lines(run)] == ["step", "4"]


def test_each_step_stands_once_in_tensorboards_log(training, interrupted, rex):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupted(2, *training.words("rex"))
    shutil.copytree(rex.checkpoints, rex.folder / "kept")
    interrupted(4, "resume")
    shutil.rmtree(rex.checkpoints)  # as if it had been killed after step 4, with nothing newer than step 2
    (rex.folder / "kept").rename(rex.checkpoints)
    training.resume()
    log = EventAccumulator(str(rex.folder / "tensorboard"))
    log.Reload()
    assert set(log.Tags()["scalars"]) >= {"loss", "instance", "prior", "lr", "grad_norm", "seconds"}
    assert [one.step for one in log.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    table = [float(line.split(",")[1]) for line in rex.metrics.read_text().splitlines()[1:]]
    assert [one.value for one in log.Scalars("loss")] == pytest.approx(table)


# ---- which run


def test_the_last_unfinished_one_is_taken(training, interrupted):
    interrupted(1, *training.words("first", "--steps", "2"))
    interrupted(1, *training.words("second", "--steps", "2"))
    training.train("third", "--steps", "1")
    assert training.resume().lines == [str(runs.folder() / "second" / "final")]
    assert training.resume().lines == [str(runs.folder() / "first" / "final")]
    message = training.refused("resume")
    assert message == "there is no unfinished run; `dbcap runs list` shows those there are"


def test_one_that_was_killed_is_unfinished_and_one_that_is_trained_is_not(training, stopped):
    run = stopped()
    run.update(status="running")
    with run.lock():
        assert training.refused("resume") == "there is no unfinished run; `dbcap runs list` shows those there are"
        assert training.refused("resume", "rex", code=4).startswith("another dbcap is at work here")
    assert training.resume().code == 0


def test_a_finished_run_is_left_alone(training, rex):
    training.train("rex", "--steps", "1")
    before = manifest_of(rex)
    result = training.resume("rex")
    assert (result.lines, result.err) == ([str(rex.final)], "rex is finished: nothing is left to do\n")
    assert manifest_of(rex) == before


def test_one_that_failed_waits_for_all_others(training, interrupted):
    interrupted(1, *training.words("first", "--steps", "2"))
    interrupted(1, *training.words("second", "--steps", "2"))
    Run(runs.folder() / "second").update(status="failed")
    assert [training.resume().lines for _ in range(2)] == [
        [str(runs.folder() / name / "final")] for name in ("first", "second")
    ]


def test_an_unknown_run(training, rex):
    training.train("rex", "--steps", "1")
    assert training.refused("resume", "rax") == "there is no run rax; did you mean rex?"
    assert "goes on with one run at a time" in training.refused("resume", "rex", "rax")
    assert sorted(os.listdir(runs.folder())) == ["rex"]


def test_damaged_manifests(training, stopped, interrupted):
    interrupted(1, *training.words("other", "--steps", "2"))
    run = stopped()
    said = json.loads(manifest_of(run))
    (run.folder / "run.json").write_text(json.dumps(said | {"config": {"model": "starter"}}))
    path = run.folder / "run.json"
    message = training.refused("resume", "rex", code=1)
    assert message == (f"{path} is damaged: it lacks the settings of the run; `dbcap runs rm rex` removes the run")
    (run.folder / "run.json").write_text("{")
    assert training.refused("resume", "rex", code=1).startswith(f"{path} is damaged: ")
    result = training.resume()
    assert result.lines == [str(runs.folder() / "other" / "final")]
    assert f"warning: {path} is damaged: " in result.err


# ---- further than it was to go


def test_what_was_left_half_written_goes_before_the_disk_is_measured(training, stopped, monkeypatch):
    half = stopped().checkpoints / ".000009.abc.tmp"
    half.mkdir()
    measured = []
    monkeypatch.setattr(preflight, "check", lambda *_: measured.append(half.exists()))
    training.resume()
    assert measured == [False]


def test_more_steps_are_a_straight_run_of_that_length(training, straight, rex, weights, lines):
    expected = straight("--ema", "--steps", "6")
    training.train("rex", "--ema", "--steps", "3")
    training.resume("rex", "--steps", "6")
    assert (weights(rex), lines(rex)) == expected
    assert (rex.read()["steps"], rex.read()["step"], rex.read()["config"]["steps"]) == (6, 6, 6)
    assert training.resume("rex", "--steps", "6").err == "rex is finished: nothing is left to do\n"


def test_more_steps_of_one_that_is_not_finished(training, straight, stopped, weights):
    expected, _ = straight("--steps", "6")
    run = stopped()
    training.resume("rex", "--steps", "6")
    assert weights(run) == expected


def test_steps_that_cannot_be_changed(training, rex):
    training.train("rex", "--lr-schedule", "cosine", "--steps", "2")
    before = manifest_of(rex)
    assert training.refused("resume", "rex", "--steps", "4") == (
        "--lr-schedule cosine depends on the number of steps, 2: 4 would be another run;"
        " runs with --lr-schedule constant can be extended"
    )
    training.train("short", "--steps", "2")
    message = training.refused("resume", "short", "--steps", "1")
    assert message == "--steps 1 is less than the 2 of this run; give more, or begin a new run"
    assert manifest_of(rex) == before


# ---- settings


def test_what_is_fixed_stays(training, stopped):
    run = stopped()
    before = manifest_of(run)
    for assignment, message in {
        "lr=0.5": "--lr is 0.0001 in this run and cannot become 0.5",
        "seed=3": "--seed is 0 in this run and cannot become 3",
        "accumulate=2": "--accumulate is 1 in this run and cannot become 2",
        "ema=true": "--ema is False in this run and cannot become True",
        "prior=none": "--prior is images in this run and cannot become none",
        "method=lora": "--method is full in this run and cannot become lora",
    }.items():
        assert training.refused("resume", "--set", f"train.{assignment}") == f"{message}; begin a new run"
        assert manifest_of(run) == before


def test_what_may_change(training, straight, stopped, tmp_path, weights):
    expected, _ = straight(*FOUR)
    run = stopped("--keep", "9")
    (tmp_path / "more.toml").write_text("[train]\nkeep = 1\nlr = 1e-4\n")
    training.resume("--config", str(tmp_path / "more.toml"), "--set", "train.checkpoint_every=1")
    assert list(run.steps()) == [4]
    assert weights(run) == expected
    assert run.read()["config"]["checkpoint_every"] == 1


# ---- what must be as it was


@pytest.mark.parametrize(
    ("name", "said"),
    [("cpu_class", "cpu class any, and here is other"), ("dtype", "precision float32, and here is bfloat16")],
)
def test_another_machine(name, said, training, stopped, monkeypatch):
    run = stopped("--precision", "auto")
    run.update(host=run.read()["host"] | {"cpu_class": "any"})
    before, choose = manifest_of(run), device.choose
    other = {"cpu_class": "other"} if name == "cpu_class" else {"dtype": "bfloat16", "cpu_class": "any"}
    monkeypatch.setattr(device, "choose", lambda **how: replace(choose(**how), **other))
    assert training.refused("resume") == (
        f"the run rex began with the {said}: it would not go on to the same bits; --allow-inexact goes on all the same"
    )
    assert manifest_of(run) == before
    training.resume("--allow-inexact")
    assert run.read()["status"] == "finished"


def test_threads_are_those_of_the_beginning(training, stopped):
    import torch

    run = stopped()
    assert run.read()["host"]["threads"] == 1
    torch.set_num_threads(2)
    training.resume()
    assert torch.get_num_threads() == 1


def test_photos_that_have_changed(training, stopped):
    run = stopped()
    before, data = manifest_of(run), run.folder / "dataset"
    shutil.copytree(data, run.folder / "kept")

    def refused(what):
        message = training.refused("resume")
        hint = f"put them back in {data}, or begin a new run"
        assert message == f"the {what} of the run rex have changed since it began; {hint}"
        shutil.rmtree(data)
        shutil.copytree(run.folder / "kept", data)

    shutil.copyfile(data / "train" / "0.png", data / "train" / "1.png")
    refused("photos")
    replace(manifest.read(data), photos=manifest.read(data).photos[:2]).write()
    refused("photos")
    text = (data / "dataset.json").read_text()
    (data / "dataset.json").write_text(text.replace("on a table", "in the sea"))
    refused("captions")
    assert manifest_of(run) == before
    training.resume()


def test_the_data_set_that_it_was_made_of_may_go(training, tiny_dataset, straight, interrupted, rex, tmp_path, weights):
    expected, _ = straight(*FOUR)
    data = shutil.copytree(tiny_dataset, tmp_path / "dog")
    interrupted(2, *training.words("rex", *FOUR, data=data))
    shutil.rmtree(data)
    training.resume()
    assert weights(rex) == expected


def test_class_images_that_have_changed(training, tiny_dataset, interrupted, tmp_path):
    data, own = shutil.copytree(tiny_dataset, tmp_path / "dog"), tmp_path / "dogs"
    found = manifest.read(data)
    shutil.copytree(found.classes.folder, own)
    replace(found, classes=replace(found.classes, folder=str(own))).write()
    interrupted(2, *training.words("rex", data=data))
    (own / "1.png").unlink()
    message = training.refused("resume")
    assert message == "the class images of the run rex have changed since it began; put them back, or begin a new run"


def test_a_model_that_has_changed(training, tiny_diffusion, interrupted, tmp_path):
    model = shutil.copytree(tiny_diffusion, tmp_path / "model")
    interrupted(2, *training.words("rex", "--model", str(model)))
    scheduler = model / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.012", "0.013"))
    message = training.refused("resume")
    assert message == f"{model} is not what the run rex began with; put it back, or begin a new run"
    model.rename(tmp_path / "moved")
    assert training.refused("resume") == f"the run rex began with {model}, which is not there any more; put it back"


def test_a_model_of_the_hub_that_moved_on_is_taken_as_it_was(training, tiny_diffusion, interrupted, rex, hub):
    served = hub()
    shutil.copytree(tiny_diffusion, served.root / "org" / "model")
    interrupted(2, *training.words("rex", "--model", "org/model"))
    scheduler = served.root / "org" / "model" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.012", "0.013"))
    training.resume()
    assert rex.read()["status"] == "finished"


# ---- damaged checkpoints


@pytest.mark.parametrize("name", ["optimizer.safetensors", "weights/unet.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(name, training, straight, stopped, weights, lines):
    expected = straight(*FOUR)
    run = stopped()
    damage(run.steps()[3] / name)
    result = training.resume()
    folder = run.checkpoints / "000003"
    assert (
        f"warning: the checkpoint {folder} is damaged: {name} is not what was written: it is left out\n" in result.err
    )
    assert (weights(run), lines(run)) == expected
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == ["000002", "000004"]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_where_all_are_damaged_it_begins_again(training, straight, stopped, weights):
    expected, _ = straight(*FOUR)
    run = stopped()
    for folder in run.steps().values():
        damage(folder / "optimizer.safetensors")
    result = training.resume()
    assert result.err.count("is damaged") == 2
    assert "rex has no checkpoint: it begins again at step 0" in result.err
    assert weights(run) == expected


def test_a_checkpoint_of_another_version_is_not_thrown_away(training, stopped, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(checkpoint, "_FORMAT", 2)
        run = stopped()
    message = training.refused("resume", code=1)
    assert message == f"another version of dbcap wrote the checkpoint {run.checkpoints / '000003'}; use that version"
    assert list(run.steps()) == [2, 3]


# ---- another run from a checkpoint


def test_a_branch_is_a_new_run_and_the_old_one_stays(training, rex, weights, lines):
    training.train("rex", "--checkpoint-every", "2", "--keep", "9", "--validate-every", "2")
    before = {path: path.read_bytes() for path in rex.folder.rglob("*") if path.is_file()}
    result = training.resume("rex", "--from", "4", "--name", "new")
    new = Run(runs.folder() / "new")
    assert result.lines == [str(new.final)]
    assert (weights(new), lines(new)) == (weights(rex), lines(rex))
    said = new.read()
    assert (said["name"], said["status"], said["config"]["name"]) == ("new", "finished", "new")
    assert said["branch"] == {"run": "rex", "step": 4}
    assert said["best"] == rex.read()["best"]
    assert [(one["from"], one["to"]) for one in said["timings"]] == [(4, 6)]
    assert {path: path.read_bytes() for path in rex.folder.rglob("*") if path.is_file()} == before
    assert sorted(os.listdir(runs.folder())) == ["new", "rex"]


def test_a_branch_of_best_and_last_with_other_settings(training, rex, interrupted):
    training.train("rex", "--checkpoint-every", "2", "--validate-every", "3")
    best = rex.best()
    training.resume("rex", "--from", "best", "--name", "b", "--set", "train.keep=1", "--steps", "7")
    said = Run(runs.folder() / "b").read()
    assert (said["branch"]["step"], said["config"]["keep"], said["step"]) == (best, 1, 7)
    assert rex.read()["steps"] == 6
    interrupted(7, "resume", "rex", "--from", "last", "--name", "c", "--steps", "8")
    training.resume()
    assert Run(runs.folder() / "c").read()["step"] == 8


def test_a_branch_of_an_embedding_keeps_its_word(training, rex):
    training.train("rex", "--method", "embedding", "--checkpoint-every", "2")
    training.resume("rex", "--from", "4", "--name", "new")
    new = Run(runs.folder() / "new")
    assert new.read()["identifier"] == "<rex>"
    names = {path.name for path in new.final.iterdir()}
    assert names == {"rex.safetensors", "README.md", "dbcap.json"}
    assert (new.final / "rex.safetensors").read_bytes() == (rex.final / "rex.safetensors").read_bytes()


def test_branches_that_there_cannot_be(training, stopped):
    run = stopped()
    before = manifest_of(run)
    together = "--from and --name go together: a checkpoint, and the new run that begins there"
    for words, message in {
        "--from 5 --name new": "the run rex has no checkpoint 5; there are 2, 3",
        "--from best --name new": "the run rex has no checkpoint best; there are 2, 3",
        "--from 2 --name rex": "there is a run rex already; `dbcap resume rex` goes on with it",
        "--from 2": together,
        "--name new": together,
        "--from 2 --name new --set lr=0.5": "--lr is 0.0001 in this run and cannot become 0.5; begin a new run",
    }.items():
        assert training.refused("resume", "rex", *words.replace("lr", "train.lr").split()) == message
        assert (manifest_of(run), sorted(os.listdir(runs.folder()))) == (before, ["rex"])


def test_a_branch_of_a_damaged_checkpoint_or_on_another_machine(training, stopped, monkeypatch):
    run = stopped()
    damage(run.steps()[3] / "optimizer.safetensors")
    message = training.refused("resume", "rex", "--from", "3", "--name", "new", code=1)
    assert message.startswith(f"the checkpoint {run.checkpoints / '000003'} is damaged: ")
    assert message.endswith("; choose --from 2")
    choose = device.choose
    monkeypatch.setattr(device, "choose", lambda **how: replace(choose(**how), cpu_class="other"))
    message = training.refused("resume", "rex", "--from", "2", "--name", "new")
    assert "it would not go on to the same bits; --allow-inexact goes on all the same" in message
    assert sorted(os.listdir(runs.folder())) == ["rex"]
    assert list(run.steps()) == [2, 3]


def test_a_branch_that_was_killed_as_it_was_copied_is_no_run(training, stopped, monkeypatch):
    stopped()
    copy = shutil.copytree

    def stop(source, target, *how):
        copy(source, target, *how)
        if Path(source).name == "000002":
            raise KeyboardInterrupt

    with monkeypatch.context() as context:  # copytree calls itself, with all it was told
        context.setattr(shutil, "copytree", stop)
        assert training("resume", "rex", "--from", "2", "--name", "new").code == 130
    assert [run.name for run in runs.every()] == ["rex"]
    training.resume("rex", "--from", "2", "--name", "new")
    assert sorted(os.listdir(runs.folder())) == ["new", "rex"]
