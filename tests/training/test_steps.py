"""What happens at the end of a step, and in which order."""

from __future__ import annotations

import csv

import pytest

from dbcap import runs
from dbcap.runs import Run
from dbcap.training import checkpoint, steps


@pytest.mark.parametrize(("every", "due"), [(0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (9, [5])])
def test_what_is_due(every, due):
    assert [step for step in range(1, 6) if steps._due(step, every, step == 5)] == due


def test_old_checkpoints_go_only_when_the_new_one_is_there(training, monkeypatch):
    seen, prune = [], checkpoint.prune

    def look(run, keep):
        seen.append([(step, bool(checkpoint.verified(folder))) for step, folder in run.steps().items()])
        prune(run, keep)

    monkeypatch.setattr(checkpoint, "prune", look)
    run = training.train("rex", "--checkpoint-every", "2", "--keep", "1", "--steps", "4")
    assert seen == [[(2, True)], [(2, True), (4, True)]]
    assert list(run.steps()) == [4]


def test_the_best_is_kept_with_its_step_and_value(training):
    run = training.train("rex", "--validate-every", "1", "--checkpoint-every", "0", "--keep", "1", "--lr", "5e-3")
    with run.metrics.open() as file:
        values = {int(row["step"]): float(row["validation"]) for row in csv.DictReader(file)}
    best = min(values, key=values.__getitem__)
    assert run.best() == best
    assert best not in (1, 6), "else this shows nothing"
    said = run.read()["best"]
    assert (said["step"], said["value"]) == (best, pytest.approx(values[best]))
    assert list(run.steps()) == [best, 6]


def test_a_link_that_was_not_made_any_more_is_made_when_it_goes_on(training, interrupted):
    """Killed between the checkpoint and the link to it, that is."""
    interrupted(2, *training.words("rex", "--validate-every", "2", "--steps", "3"))
    run = Run(runs.folder() / "rex")
    (run.checkpoints / "best").unlink()
    training.resume("--set", "train.validate_every=0", "--set", "train.keep=1")
    assert run.best() == 2
    assert list(run.steps()) == [2, 3]


def test_looking_at_it_does_not_change_it(training, straight, weights):
    expected, _ = straight("--steps", "3")
    looks = ["--validate-every", "1", "--sample-every", "2", "--checkpoint-every", "1"]
    run = training.train("rex", "--steps", "3", *looks, "--sample-guidance", "1")
    assert weights(run) == expected


def test_metrics_of_a_step_are_means_over_its_micro_batches(training):
    """Both halves, what was minimised, and the learning rate that the step was taken with."""
    words = ["--steps", "2", "--prior-weight", "0.5", "--lr-schedule", "linear", "--validate-every", "2"]
    whole = training.train("whole", *words, "--batch-size", "4")
    parts = training.train("parts", *words, "--batch-size", "1", "--accumulate", "4")
    rows = []
    for run in (whole, parts):
        with run.metrics.open() as file:
            rows.append([{name: float(value or -1) for name, value in row.items()} for row in csv.DictReader(file)])
    for one, other in zip(*rows, strict=True):
        assert one["loss"] == pytest.approx(one["instance"] + 0.5 * one["prior"])
        for name in ("step", "instance", "prior", "lr", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=2e-5), name
    assert [row["lr"] for row in rows[0]] == pytest.approx([1e-4, 0.5e-4])
    assert (rows[0][0]["validation"], rows[0][1]["validation"] > 0) == (-1, True)
    last = rows[0][1]
    assert last["validation"] == pytest.approx(last["validation_instance"] + 0.5 * last["validation_prior"])


def test_without_class_images_there_is_no_prior(training):
    run = training.train("rex", "--steps", "1", "--prior", "none", "--validate-every", "1")
    (row,) = list(csv.DictReader(run.metrics.open()))
    assert (row["prior"], row["validation_prior"]) == ("0", "")
    assert (row["loss"], row["validation"]) == (row["instance"], row["validation_instance"])


def test_the_result_of_a_moving_average_is_the_average(training):
    from safetensors.torch import load

    run = training.train("rex", "--steps", "3", "--ema", "--ema-decay", "0.5")
    folder = run.steps()[3]
    final, average, weights = (
        load(path.read_bytes())["conv_in.weight"]
        for path in (
            run.final / "unet" / "diffusion_pytorch_model.safetensors",
            folder / "ema" / "unet.safetensors",
            folder / "weights" / "unet.safetensors",
        )
    )
    assert final.equal(average)
    assert not final.equal(weights)
