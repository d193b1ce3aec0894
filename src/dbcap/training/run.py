"""`dbcap train` and `dbcap resume`: which run, its lock and its states, and what is said in the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dbcap import runs
from dbcap.config.fields import cli_of, flag_of
from dbcap.config.models import CommonConfig
from dbcap.config.training import ResumeConfig, TrainConfig
from dbcap.errors import OK, OUT_OF_TIME, PARTIAL, SIGINT, DbcapError, Interrupted, UsageError
from dbcap.events import Events
from dbcap.files import write_stdout
from dbcap.generation.jobs import slug
from dbcap.generation.plan import seconds_of
from dbcap.inputs import shown
from dbcap.models.hub import parsed
from dbcap.runs import FAILED, FINISHED, INTERRUPTED, RUNNING, Run
from dbcap.runs import OUT_OF_TIME as TIME_OVER
from dbcap.training import checkpoint
from dbcap.training.checkpoint import DamagedError
from dbcap.training.settled import given, of_data, settled
from dbcap.training.signals import StoppedError, wait_for_training


@dataclass(frozen=True)
class TrainReport:
    """What came of it."""

    run: Run
    step: int
    steps: int
    failed: int = 0
    """Photos that could not be prepared."""
    note: str = ""

    @property
    def exit_code(self) -> int:
        """0; 3 when photos failed; 5 when time ran out."""
        if self.step < self.steps:
            return OUT_OF_TIME
        return PARTIAL if self.failed else OK

    @property
    def summary(self) -> str:
        """One line for stderr."""
        if self.note:
            return self.note
        if self.step < self.steps:
            return f"step {self.step} of {self.steps}: --max-time is over; `dbcap resume {self.run.name}` goes on"
        without = f", without {self.failed} photo{'s' * (self.failed != 1)} that failed" if self.failed else ""
        return f"{self.run.name} is trained{without}; `dbcap generate PROMPT --model run:{self.run.name}` uses it"


# ---- a new run


def train(config: TrainConfig, asked: Container[str], common: CommonConfig, events: Events) -> TrainReport:
    """Train as `dbcap train` does; `asked` are the settings that come from nowhere else than this command.

    Raises DbcapError; Interrupted where a signal stops it.
    """
    started = time.monotonic()
    wait_for_training()
    config = _rooted(settled(config))
    for one in config.data:
        if not os.path.exists(one):
            raise UsageError(f"there is no {shown(one)}", "name a data set of `dbcap prep`, or photos")
    if data := given(config):
        config = of_data(config, data, asked)
    run = _new(config)
    with run.lock():
        if _begun(run):  # by another command, which was quicker
            raise _taken(run.name)
        for name in {*os.listdir(run.folder)} - {runs.LOCK}:  # of one that failed before it had anything to keep
            _remove(run.folder / name)
        run.write(
            {
                "name": run.name,
                "status": RUNNING,
                "step": 0,
                "steps": config.steps,
                "method": config.method,
                "identifier": None,
                "class": None,
                "config": config.model_dump(mode="json"),
                "base": None,
                "data": None,
                "failed_photos": 0,
                "host": None,
                "best": None,
                "message": "",
                "created": runs.now(),
                "changed": runs.now(),
                "timings": [],
            }
        )
        try:
            return _work(run, config, common, events, started, None)
        except UsageError:  # refused before anything was done
            if not run.steps():
                shutil.rmtree(run.folder, ignore_errors=True)
            raise


def _rooted(config: TrainConfig) -> TrainConfig:
    """Return the settings with absolute paths: a run may go on from another folder."""
    data = tuple(os.path.abspath(os.path.expanduser(one)) for one in config.data)
    model = parsed(config.model)
    own = {"model": model.path} if model.path and not model.variant else {}  # with a variant it will be refused
    places = {"base": config.base, "class_dir": config.class_dir, **own}
    rooted = {name: os.path.abspath(place) for name, place in places.items() if place}
    return config.model_copy(update={"data": data, **rooted})


def _new(config: TrainConfig) -> Run:
    """Make the folder of a run, its name being free. Raises UsageError where it is taken."""
    if config.name:
        run = Run(runs.folder() / config.name)
        run.folder.mkdir(parents=True, exist_ok=True)
        if _begun(run):
            raise _taken(run.name)
        return run
    stem = slug(config.class_word or Path(config.data[0]).stem, 50)
    number = 1
    while True:
        run = Run(runs.folder() / f"{stem}-{number}")
        try:
            run.folder.mkdir(parents=True)
            return run
        except FileExistsError:
            number += 1


def _begun(run: Run) -> bool:
    """Return whether there is a run that can go on, or something else of the user's, rather than what is left of one.

    A command that was killed as it began left a lock; one that failed before its first checkpoint has nothing to lose.
    """
    if not {*os.listdir(run.folder)} - {runs.LOCK}:
        return False
    try:
        said = run.read()
    except DbcapError:
        return True
    return said["status"] != FAILED or bool(run.steps())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _taken(name: str) -> UsageError:
    return UsageError(f"there is a run {name} already", f"`dbcap resume {name}` goes on with it")


# ---- going on


def resume(config: ResumeConfig, changes: Mapping[str, Any], common: CommonConfig, events: Events) -> TrainReport:
    """Go on with a run as `dbcap resume` does. `changes` are settings of `dbcap train` that were given on the way.

    Raises UsageError for a run that is not there and for a setting that must stay as it is, LockHeldError where
    somebody is at it.
    """
    started = time.monotonic()
    wait_for_training()
    run = runs.find(config.runs[0]) if config.runs else _unfinished(events)
    if config.from_ is not None:
        return _branch(run, config, changes, common, events, started)
    with run.lock():
        said = run.read()
        before = _settings(run, said)
        settings = _changed(before, config, changes)
        if said["status"] == FINISHED and settings.steps == before.steps:
            if run.final.is_dir():
                _print(run.final)
            return TrainReport(run, said["step"], said["step"], note=f"{run.name} is finished: nothing is left to do")
        start = _newest_sound(run, events)
        run.update(status=RUNNING, steps=settings.steps, config=settings.model_dump(mode="json"), changed=runs.now())
        try:
            return _work(run, settings, common, events, started, start, allow_inexact=config.allow_inexact)
        except UsageError:  # refused: it stays what it was
            run.write(said)
            raise


def _unfinished(events: Events) -> Run:
    """Return the newest unfinished run; one that failed by itself, and may do so again, after all others."""
    found: list[tuple[bool, Run]] = []
    for run in runs.every():
        try:
            status = run.read()["status"]
        except DbcapError as error:
            events.warn(str(error))
            continue
        if status in runs.UNFINISHED and not run.is_locked():
            found.append((status == FAILED, run))
    if not found:
        raise UsageError("there is no unfinished run", "`dbcap runs list` shows those there are")
    return min(found, key=lambda one: one[0])[1]


def _settings(run: Run, said: Mapping[str, Any]) -> TrainConfig:
    """Return the settings that a run began with. Raises DbcapError where the manifest is damaged."""
    try:
        return TrainConfig(**said["config"])
    except (LookupError, TypeError, ValidationError) as error:
        hint = f"`dbcap runs rm {run.name}` removes the run"
        raise DbcapError(f"{run.folder / runs.MANIFEST} is damaged: it lacks the settings of the run", hint) from error


def _changed(before: TrainConfig, config: ResumeConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """Return the settings that a run goes on with. Raises UsageError, with both values, for one that is fixed."""
    new = dict(changes)
    if config.steps is not None:
        new["steps"] = config.steps
    new["max_time"] = config.max_time or new.get("max_time")  # of this command alone
    for name, value in new.items():
        old = getattr(before, name)
        if name in ("steps", "max_time") or value == old or cli_of(TrainConfig.model_fields[name]).changeable:
            continue
        raise UsageError(f"{flag_of(name)} is {old} in this run and cannot become {value}", "begin a new run")
    if new.get("steps", before.steps) != before.steps:
        _check_extension(before, new["steps"])
    return before.model_copy(update=new)


def _check_extension(before: TrainConfig, steps: int) -> None:
    if before.lr_schedule != "constant":
        raise UsageError(
            f"--lr-schedule {before.lr_schedule} depends on the number of steps, {before.steps}: {steps} would be"
            " another run",
            "runs with --lr-schedule constant can be extended",
        )
    if steps < (before.steps or 0):
        raise UsageError(
            f"--steps {steps} is less than the {before.steps} of this run", "give more, or begin a new run"
        )


def _newest_sound(run: Run, events: Events) -> Path | None:
    """Return the newest checkpoint whose hashes are right; damaged ones are said, and removed."""
    for folder in reversed(run.steps().values()):
        try:
            checkpoint.verified(folder)
            return folder
        except DamagedError as error:
            events.warn(f"{error.message}: it is left out")
            checkpoint.set_aside(folder)
    events.say(f"{run.name} has no checkpoint: it begins again at step 0")
    return None


def _branch(
    run: Run, config: ResumeConfig, changes: Mapping[str, Any], common: CommonConfig, events: Events, started: float
) -> TrainReport:
    """Begin a new run from a checkpoint of another."""
    start = run.checkpoint(str(config.from_))
    try:
        best = checkpoint.verified(start)["lightning"]["best"]
    except DamagedError as error:
        others = ", ".join(f"--from {step}" for step in run.steps() if run.steps()[step] != start)
        raise DbcapError(error.message, f"choose {others}" if others else "there is no other") from error
    said = run.read()
    settings = _changed(_settings(run, said), config, changes).model_copy(update={"name": config.name})
    new = Run(runs.folder() / str(config.name))
    if new.folder.exists():
        raise _taken(new.name)
    hidden = Run(new.folder.with_name(f".{new.name}.tmp"))  # half a run is none
    with hidden.lock():
        _copy(run, hidden, start, best)
        changed = {"config": settings.model_dump(mode="json"), "steps": settings.steps, "changed": runs.now()}
        origin = {"branch": {"run": run.name, "step": int(start.name)}, "created": runs.now(), "timings": []}
        about = {"name": new.name, "status": RUNNING, "step": int(start.name), "best": best, "message": ""}
        hidden.write(said | about | changed | origin)
        hidden.folder.rename(new.folder)
        try:
            place = new.checkpoints / start.name
            return _work(new, settings, common, events, started, place, allow_inexact=config.allow_inexact)
        except UsageError:
            shutil.rmtree(new.folder, ignore_errors=True)
            raise


def _copy(run: Run, to: Run, start: Path, best: Mapping[str, Any] | None) -> None:
    """Copy what a new run needs of another: a checkpoint and the best one before it, data set and metrics."""
    from dbcap.training.material import FOLDER

    try:
        for name in {*os.listdir(to.folder)} - {runs.LOCK}:  # of a command that was killed
            shutil.rmtree(to.folder / name, ignore_errors=True)
        shutil.copytree(run.folder / FOLDER, to.folder / FOLDER)
        shutil.copytree(start, to.checkpoints / start.name)
        if best and best["step"] in run.steps():
            place = checkpoint.place_of(to.checkpoints, best["step"])
            if not place.exists():
                shutil.copytree(run.steps()[best["step"]], place)
            checkpoint.mark_best(to.checkpoints, best["step"])
        shutil.copyfile(run.metrics, to.metrics)
    except OSError as error:
        shutil.rmtree(to.folder, ignore_errors=True)
        raise DbcapError(f"cannot copy the run {run.name}: {error.strerror or error}", "make room there") from error


# ---- the work, and what becomes of the run


def _work(
    run: Run,
    config: TrainConfig,
    common: CommonConfig,
    events: Events,
    started: float,
    start: Path | None,
    *,
    allow_inexact: bool = False,
) -> TrainReport:
    """Do the work, and write down how it ended."""
    deadline = started + seconds_of(config.max_time) if config.max_time else None
    status, message, failed = FAILED, "", 0
    try:
        from dbcap.training.session import Session  # this takes seconds, in which signals come too

        session = Session(run, config, common, events, deadline=deadline, allow_inexact=allow_inexact)
        session.go(start)
        failed, status = run.read().get("failed_photos", 0), FINISHED
    except StoppedError as error:
        status = TIME_OVER if error.exit_code is None else INTERRUPTED
        if error.exit_code is not None:
            raise Interrupted(error.exit_code, _state(run, config)) from None
    except (KeyboardInterrupt, Interrupted) as error:
        status = INTERRUPTED
        code = error.exit_code if isinstance(error, Interrupted) else SIGINT
        raise Interrupted(code, _state(run, config)) from None
    except Exception as error:
        message = str(error)
        raise
    finally:
        step = (config.steps or 0) if status == FINISHED else max(run.steps(), default=0)
        took = {"from": int(start.name) if start else 0, "to": step, "seconds": round(time.monotonic() - started, 1)}
        with contextlib.suppress(*(() if status == FINISHED else (OSError, DbcapError))):  # what is raised says more
            timings = [*run.read().get("timings", []), took]
            run.update(status=status, step=step, message=message, changed=runs.now(), timings=timings)
    if status == FINISHED:
        _print(run.final)
    return TrainReport(run, step, config.steps or 0, failed)


def _print(folder: Path) -> None:
    write_stdout(f"{folder}\n".encode("utf-8", "surrogateescape"))


def _state(run: Run, config: TrainConfig) -> str:
    step = max(run.steps(), default=0)
    return f"step {step} of {config.steps} is kept; `dbcap resume {run.name}` goes on"
