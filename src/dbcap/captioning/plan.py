"""What a run of `dbcap caption` settles before anything slow begins: inputs, output, what is done already."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from dbcap import images, inputs
from dbcap.captioning import records, sinks
from dbcap.captioning.journal import Journal, Progress
from dbcap.captioning.records import LINE_FORMATS, Placed
from dbcap.captioning.xmp import Xmp
from dbcap.config.models import CaptionConfig
from dbcap.errors import InputError, UsageError, did_you_mean
from dbcap.events import Events
from dbcap.files import Lock, lock_beside, working_folder
from dbcap.inputs import Found, Source, shown
from dbcap.plugins import loader

PLACED = ("sidecar", "metadata", "xmp")


@dataclass
class Job:
    """What a run has settled before the model is loaded."""

    found: Found
    todo: list[Source]
    errors: sinks.ErrorLog
    existing: int = 0  # inputs that have a caption already
    placed: Placed | None = None
    journal: Journal | None = None
    progress: Progress | None = None
    write: Callable[[bytes], None] | None = None  # to a stream


def _check_format(name: str) -> None:
    known = list(dict.fromkeys([*LINE_FORMATS, *PLACED]))
    if name not in known:  # plugins are loaded only for a name that is none of ours
        known += loader.writers(known)
    if name not in known:
        raise UsageError(
            f"--format {name} is not known: it must be one of {', '.join(known)}", did_you_mean(name, known)
        )


def make_plan(config: CaptionConfig, events: Events, stack: ExitStack) -> Job | None:
    """Find the inputs and the output, and refuse what cannot end well. None where FILE is finished already."""
    working_folder()
    images.parse_colour(config.alpha)
    _check_format(config.format)
    placed = _placed(config)
    if config.lock:
        stack.enter_context(Lock(Path(config.lock)))
    write = None if placed else sinks.stream_target(config.output, stack)
    if config.output and config.errors and os.path.realpath(config.output) == os.path.realpath(config.errors):
        raise UsageError(f"-o and --errors name the same file {shown(config.output)}", "name another")
    errors = sinks.ErrorLog(config.errors, stack)
    if placed or write:
        found = _discover(config, events)
        job = Job(found, found.sources, errors, placed=placed, write=write)
        return _without_existing(job, config, stack) if placed else job
    output = str(config.output)
    journal = sinks.open_journal(
        output, resume=config.resume, force=config.force, locked=bool(config.lock), stack=stack
    )
    if journal is None:
        return None
    if config.resume and journal.exists():
        progress = journal.read()
        if progress.done:  # else there is nothing to go on from
            todo = progress.sources[progress.done :]
            if progress.settings:
                todo = [_found_since(source) for source in todo]
            found = Found(progress.sources, 0, progress.single, [])
            return Job(found, todo, errors, journal=journal, progress=progress)
    found = _discover(config, events)
    return Job(found, found.sources, errors, journal=journal)


def _found_since(source: Source) -> Source:
    """Give a file another chance that was missing at first: after `--on-error stop` it was put in place."""
    return replace(source, error=None) if source.error and os.path.isfile(source.name) else source


def _discover(config: CaptionConfig, events: Events) -> Found:
    stdin = getattr(sys.stdin, "buffer", None)  # there is no stdin where it was closed
    found = inputs.discover(config.inputs, recursive=config.recursive, null=config.null, stdin=stdin)
    _refuse_to_overwrite_inputs(config, found.sources)
    for name in found.empty:
        events.say(f"{shown(name)}: nothing to caption there")
    if found.ignored:
        events.say(
            f"left out {found.ignored} file{' that is no picture' if found.ignored == 1 else 's that are no pictures'}"
        )
    return found


def _refuse_to_overwrite_inputs(config: CaptionConfig, sources: Sequence[Source]) -> None:
    """Raise UsageError where a file that we would write is one of the images."""
    written: dict[tuple[int, int], str] = {}
    for flag, name in (("-o", config.output), ("--errors", config.errors), ("--lock", config.lock)):
        if name and (identity := _identity(name)):
            if identity in written:
                raise UsageError(f"{written[identity]} and {flag} name the same file {shown(name)}", "name another")
            written[identity] = flag
    for source in sources if written else ():
        flag = "" if source.is_url else written.get(_identity(source.name) or (0, 0), "")
        if flag:
            raise UsageError(
                f"{flag} would write into {shown(source.name)}, which is to be captioned", "name another file"
            )


def _identity(name: str) -> tuple[int, int] | None:
    """Return what tells a regular file from all others, whatever its name."""
    try:
        state = os.stat(name)
    except (OSError, ValueError):
        return None
    return (state.st_dev, state.st_ino) if stat.S_ISREG(state.st_mode) else None


def _placed(config: CaptionConfig) -> Placed | None:
    if config.format == "sidecar":
        return records.Sidecar(config.extension)
    if config.format == "xmp":
        return Xmp()
    return records.MetadataFolder() if config.format == "metadata" and config.output is None else None


def _shared_tables(placed: Placed, sources: Sequence[Source]) -> list[Path]:
    """Return the files that many captions go into; rewritten as a whole, they bear one writer at a time."""
    if not isinstance(placed, records.MetadataFolder):
        return []
    folders = {str(placed.target(source).parent) for source in sources}
    return [Path(folder, "metadata.jsonl") for folder in sorted(set(map(os.path.realpath, folders)))]


def _without_existing(job: Job, config: CaptionConfig, stack: ExitStack) -> Job:
    """Take out the inputs that have a caption, or refuse them, as `--existing` says."""
    assert job.placed
    good = [source for source in job.todo if not source.error]
    for table in _shared_tables(job.placed, good):
        stack.enter_context(lock_beside(table))
    job.placed.check(good)
    if config.existing not in ("skip", "error"):
        return job
    todo = []
    for source in job.todo:
        try:
            there = not source.error and job.placed.has(source)
        except InputError as error:
            source, there = replace(source, error=error), False
        if there and config.existing == "error":
            raise UsageError(
                f"{shown(source.name)} has a caption already", "--existing skip, overwrite, append or prepend go on"
            )
        if not there:
            todo.append(source)
    return replace(job, todo=todo, existing=len(job.todo) - len(todo))
