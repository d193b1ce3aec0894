"""Real processes: killed at any moment, sent signals, out of disk; and gone on with to the same bits."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from dbcap import runs
from dbcap.config.paths import cache_dir
from dbcap.runs import Run
from dbcap.training import checkpoint, metrics

LONG = ["--steps", "8", "--accumulate", "2", "--ema", "--checkpoint-every", "2", "--validate-every", "3"]


@pytest.fixture
def rex(training) -> Run:
    """The run that these tests are about, before it is there."""
    return Run(runs.folder() / "rex")


@pytest.fixture
def expected(straight):
    """Weights and metrics of an uninterrupted run."""
    return straight(*LONG)


@pytest.fixture
def killed(training, start, rex, until):
    """Return a function that starts training, or goes on with it, and kills it as soon as something is true."""

    def call(due, *words: str) -> None:
        process = start(*(("resume", "rex") if rex.folder.exists() else training.words("rex", *LONG, *words)))
        until(lambda: due(process) or not process.alive())
        process.signal(signal.SIGKILL)
        assert process.wait().code == -signal.SIGKILL
        assert rex.read()["status"] == "running"

    return call


def steps(run: Run) -> int:
    """Return the last step that the metrics know."""
    return max((int(row["step"]) for row in metrics.read(run.metrics)), default=0)


def half(run: Run) -> bool:
    """Tell whether a checkpoint is being written."""
    return any(run.checkpoints.glob(".*.tmp/weights"))


def assert_whole(run: Run, expected) -> None:
    weights, lines = expected
    assert {name: checkpoint.sha256_of(run.final / name) for name in weights} == weights
    found = [line.split(",") for line in run.metrics.read_text().splitlines()]
    assert [",".join(cells[:6] + cells[7:]) for cells in found] == lines
    assert not list(run.folder.glob(".*.tmp"))
    assert not list(run.checkpoints.glob(".*.tmp"))
    assert run.read()["status"] == "finished"


# ---- kill -9

POINTS = {
    "as it begins": lambda run: (run.folder / "run.json").exists(),
    "encoding": lambda _: any((cache_dir() / "latents").rglob("*.safetensors")),
    "at step 5": lambda run: steps(run) >= 5,
    "with a checkpoint half written": half,
    "with the result half written": lambda run: any(run.folder.glob(".final*")) or run.final.exists(),
}


@pytest.mark.parametrize("due", POINTS.values(), ids=POINTS)
def test_killed_and_resumed_it_ends_with_the_same_bits(due, expected, killed, training, rex):
    killed(lambda _: due(rex))
    training.resume()
    assert_whole(rex, expected)


def test_killed_three_times(expected, killed, training, rex):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed(lambda _: steps(rex) >= 3)
    killed(lambda _: steps(rex) >= 5)
    killed(lambda _: half(rex))
    training.resume()
    assert_whole(rex, expected)
    log = EventAccumulator(str(rex.folder / "tensorboard"))
    log.Reload()
    assert [one.step for one in log.Scalars("loss")] == list(range(1, 9))
    assert [one.step for one in log.Scalars("validation")] == [3, 6, 8]


def children(process) -> list[int]:
    """Return the processes that a process has started."""
    return [*map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are not forked")
def test_workers_of_a_killed_run_end_with_it_and_its_lock_is_free(killed, training, rex, until):
    workers = []

    def due(process):
        workers[:] = children(process)
        return steps(rex) >= 2

    killed(due, "--workers", "2")
    assert len(workers) == 2
    until(lambda: rex.state(rex.read()) == "interrupted", 3)  # torch's workers look for their parent every 5 seconds
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 3)
    training.resume("rex", "--set", "train.workers=0")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_any_moments(seed, expected, training, start, rex):
    began = time.monotonic()
    assert start(*training.words("other", *LONG)).wait().code == 0
    whole, chance = time.monotonic() - began, random.Random(seed)

    def command() -> list[str]:
        return ["resume", "rex"] if (rex.folder / "run.json").exists() else training.words("rex", *LONG)

    for _ in range(3):
        process = start(*command())
        time.sleep(chance.random() * whole)
        process.signal(signal.SIGKILL)
        assert process.wait().code in (-signal.SIGKILL, 0)
    assert training(*command()).code == 0
    assert_whole(rex, expected)


# ---- signals


def test_a_signal_keeps_the_step_and_says_how_to_go_on(expected, training, start, rex, until):
    process = start(*training.words("rex", *LONG))
    until(lambda: steps(rex) >= 3)
    process.signal(signal.SIGTERM)
    assert_stopped(process.wait(), 143, "terminated", rex)
    training.resume()
    assert_whole(rex, expected)


def test_ctrl_c_that_reaches_workers_too(expected, training, start, rex, until):
    """A terminal sends it to all processes of a command."""
    process = start(*training.words("rex", *LONG, "--workers", "2"))
    until(lambda: steps(rex) >= 2)
    for pid in (*children(process), process.pid):
        os.kill(pid, signal.SIGINT)
    assert_stopped(process.wait(), 130, "interrupted", rex)
    training.resume("--set", "train.workers=0")
    assert_whole(rex, expected)


def assert_stopped(result, code, word, run):
    (step,) = list(run.steps())[-1:]
    estimate, error = result.err.splitlines()
    assert (result.code, result.out) == (code, b"")
    assert error == f"error: {word}: step {step} of 8 is kept; `dbcap resume rex` goes on"
    assert estimate.startswith("rex: 1.0 M weights are trained; about ")
    assert (run.read()["status"], run.read()["step"]) == ("interrupted", step)


def test_a_signal_before_training_begins(expected, training, start, rex, until):
    process = start(*training.words("rex", *LONG))
    until(lambda: (rex.folder / "dataset").exists())
    process.signal(signal.SIGTERM)
    result = process.wait()
    assert result.code == 143
    assert rex.read()["status"] == "interrupted"
    training.resume()
    assert_whole(rex, expected)


def test_two_ctrl_c_leave_a_sound_checkpoint(expected, training, start, rex, until):
    process = start(*training.words("rex", *LONG))
    until(lambda: steps(rex) >= 5)
    process.signal(signal.SIGINT)
    process.signal(signal.SIGINT)
    assert process.wait().code == 130
    for folder in rex.steps().values():
        assert checkpoint.verified(folder)
    training.resume()
    assert_whole(rex, expected)


def test_a_wish_for_a_checkpoint_at_any_time(expected, training, start, rex, until):
    process = start(*training.words("rex", *LONG, "--checkpoint-every", "0", "--keep", "9"))
    until(lambda: (rex.folder / "dataset").exists())
    process.signal(signal.SIGUSR1)
    until(lambda: rex.steps() or not process.alive())
    assert process.wait().code == 0
    assert len(rex.steps()) >= 2, "the one that was asked for before the first step, and the last"
    weights, _ = expected
    assert {name: checkpoint.sha256_of(rex.final / name) for name in weights} == weights


# ---- two at once, and no room


def test_two_at_once(training, start, rex, until):
    process = start(*training.words("rex", *LONG, "--steps", "1000"))
    until(lambda: steps(rex) >= 1)
    assert training.refused("resume", "rex", code=4).startswith("another dbcap is at work here: it holds")
    assert training.refused("runs", "rm", "rex", code=4).startswith("the run rex is being trained")
    assert process.alive()


def test_a_full_disk(expected, training, start, rex):
    """No file may be larger than 3 MB: the weights fit, the optimizer's state does not."""
    result = start(*training.words("rex", *LONG, "--checkpoint-every", "3"), most=3_000_000).wait()
    assert result.code == 1
    place = rex.checkpoints / "000003"
    assert result.error.startswith(f"cannot write the checkpoint {place}: ")
    assert result.error.endswith("; make room; `dbcap resume rex` goes on from the last checkpoint")
    assert "Traceback" not in result.err
    assert (list(rex.checkpoints.iterdir()), rex.read()["status"]) == ([], "failed")
    training.resume()
    assert_whole(rex, expected)
