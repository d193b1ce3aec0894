"""The whole way of `dbcap generate`: plan > what is missing > encode prompts > denoise > decode > write > report."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbcap.config.models import CommonConfig, GenerateConfig
from dbcap.config.paths import cache_dir
from dbcap.errors import OK, OUT_OF_TIME, PARTIAL, SIGINT, DbcapError, Interrupted, UsageError
from dbcap.events import Events, Tracker
from dbcap.files import Lock
from dbcap.generation import engines, jobs, like, plan, prompts
from dbcap.generation.gallery import Gallery
from dbcap.generation.jobs import UnfitError
from dbcap.generation.like import Recipe
from dbcap.generation.manifest import Manifest
from dbcap.generation.output import Printer
from dbcap.generation.plan import Given, Planned
from dbcap.inputs import shown
from dbcap.models import families, hub

if TYPE_CHECKING:
    from dbcap.generation.renderer import Renderer
    from dbcap.models.device import Choice
    from dbcap.models.families.description import Description
    from dbcap.models.families.sd import StableDiffusion
    from dbcap.models.hub import LocalModel

MOST_BATCH = 16
LARGE = 100_000_000
"""Parameters from which one image at a time keeps a CPU busy."""


@dataclass(frozen=True)
class GenerateReport:
    """What came of a run."""

    made: int = 0
    failed: int = 0
    skipped: int = 0
    left: int = 0
    """Not made, since the time was over."""
    again: str = "the same command"
    """What makes the rest."""
    note: str = ""

    @property
    def exit_code(self) -> int:
        """0; 3 when images failed, 5 when time ran out."""
        return OUT_OF_TIME if self.left else PARTIAL if self.failed else OK

    @property
    def summary(self) -> str:
        """One line for stderr."""
        if self.note:
            return self.note
        parts = [f"{self.made} made"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if self.skipped:
            parts.append(f"{self.skipped} there already")
        if self.left:
            parts.append(f"{self.left} left as --max-time is over; {self.again} goes on")
        elif self.skipped and not self.made:
            parts.append("--seed random makes others")
        return ", ".join(parts)


def run(config: GenerateConfig, common: CommonConfig, events: Events) -> GenerateReport:
    """Make images as `dbcap generate` does. Raises DbcapError; images that failed are counted in the report."""
    started = time.monotonic()
    jobs.check_template(config.name)
    recipe = None
    if config.like:
        recipe, config = like.read(config.like, config)
    requests = prompts.read(config.prompts, getattr(sys.stdin, "buffer", None))
    given = plan.read_given(config)
    local = hub.locate(
        config.model,
        kind=engines.kind_for(config.engine),
        base=config.base,
        safety=config.safety,
        offline=common.offline,
        allow_pickle=common.allow_pickle,
        events=events,
        home=cache_dir(),
    )
    model, given = families.describe(local), plan.with_own(given, local.additions)
    if recipe:
        planned = [plan.repeated(recipe.job, model, local.revision, given, config)]
    else:
        planned = plan.make(config, requests, model, local.revision, given)
    opened = functools.cache(functools.partial(_open_model, config, local, given, recipe, events))
    out = Path(config.out)
    if os.path.lexists(out) and not out.is_dir():
        raise UsageError(f"--out {shown(config.out)} is no folder", "choose another")
    if config.dry_run:
        return _told(config, plan.measured(planned, opened()[0], events), Manifest(out))
    with _locked(config):
        printer = Printer(config.format)
        return _Run(config, events, model, opened, planned, given, started, recipe, printer).run()


def make(
    config: GenerateConfig, planned: Sequence[Planned], local: LocalModel, printer: Printer, events: Events
) -> GenerateReport:
    """Make what is missing of planned images, of which `printer` is told. All else is as in `run`.

    Every batch is a whole one, however few images there are: so an image is the same to the bit whatever the plan holds
    after it.
    """
    model, given = families.describe(local), plan.with_own(Given(), local.additions)
    opened = functools.cache(functools.partial(_open_model, config, local, given, None, events))
    with _locked(config):
        run = _Run(config, events, model, opened, planned, given, time.monotonic(), None, printer, whole_batches=True)
        return run.run()


@contextlib.contextmanager
def _locked(config: GenerateConfig) -> Iterator[None]:
    """Hold the output folder; refused, a run leaves nothing behind."""
    out = Path(config.out)
    with ExitStack() as stack:
        if not out.exists():
            stack.callback(_remove_if_empty, out)
        lock = Path(config.lock) if config.lock else out / ".dbcap.lock"
        stack.enter_context(Lock(lock, remove=not config.lock))
        yield


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _open_model(
    config: GenerateConfig, local: LocalModel, given: Given, recipe: Recipe | None, events: Events
) -> tuple[StableDiffusion, Choice]:
    """Import torch, and return the model with what is added to it, none of its parts loaded."""
    import torch

    choice = engines.choose(config, local, recipe.threads if recipe else None)
    for reason in (*choice.why[:2], choice.why[3]):
        events.detail(reason)
    torch.set_num_threads(choice.threads)
    family = families.load(local, choice.device, choice.dtype)
    for one in given.additions:
        family.add(one)
    return family, choice


def _told(config: GenerateConfig, planned: Sequence[Planned], manifest: Manifest) -> GenerateReport:
    """Print what would be made."""
    printer = Printer(config.format)
    missing = 0
    for one in planned:
        there = config.existing != "overwrite" and manifest.find(one.job.key)
        missing += not there
        printer.plan(one, str(there) if there else "")
    return GenerateReport(note=f"{missing} of {len(planned)} images would be made")


class _Run:
    """One run, from the plan to the report."""

    def __init__(
        self,
        config: GenerateConfig,
        events: Events,
        model: Description,
        opened: Callable[[], tuple[StableDiffusion, Choice]],
        planned: Sequence[Planned],
        given: Given,
        started: float,
        recipe: Recipe | None,
        printer: Printer,
        *,
        whole_batches: bool = False,
    ) -> None:
        self._config, self._events, self._given, self._planned = config, events, given, planned
        self._opened = opened
        """What imports torch and reads the model: a run that finds everything there needs neither."""
        self._row = recipe.row if recipe else None
        self._whole_batches = whole_batches or self._row is not None
        self._batch_size = self._size_of_batches(model)
        self._gallery = Gallery(config, model, given, self._again(), events)
        self._printer = printer
        self._deadline = started + plan.seconds_of(config.max_time) if config.max_time else None
        self._made = self._failed = 0

    def run(self) -> GenerateReport:
        """Make everything that is missing."""
        if self._config.grid:
            self._gallery.check_grid()
        missing = self._missing()
        if missing or self._config.long_prompt == "error":
            family, choice = self._opened()
            self._planned = plan.measured(self._planned, family, self._events)
        self._printer.expect([one.index for one in self._planned])
        left = 0
        try:
            if missing:
                left = self._make(missing, family, choice)
        except (KeyboardInterrupt, Interrupted) as error:
            self._printer.close()
            code = error.exit_code if isinstance(error, Interrupted) else SIGINT
            done = f"{self._made} of {len(missing)} are made; {self._again()} goes on"
            raise Interrupted(code, done) from None
        except DbcapError:
            self._printer.close()
            raise
        self._printer.close()
        if self._config.grid and not left:
            self._gallery.write_grid(self._planned)
        return GenerateReport(self._made, self._failed, len(self._planned) - len(missing), left, self._again())

    def _again(self) -> str:
        """Say what makes the rest: after --seed random not the same command, which draws another."""
        drawn = self._config.seed == "random" and not self._config.like
        return f"the same command with --seed {self._planned[0].job.seed}" if drawn else "the same command"

    # ---- what there is to do

    def _missing(self) -> list[Planned]:
        """Return what is to be made; of equal jobs in a plan the first."""
        missing: list[Planned] = []
        seen: dict[str, int] = {}
        for one in self._planned:
            key = one.job.key
            path = self._gallery.find(key)
            if path and self._config.existing == "error":
                raise UsageError(f"{shown(str(path))} is there already", "--existing skip or overwrite go on")
            if path and self._config.existing == "skip":
                self._printer.skipped(one, path)
            elif key in seen:
                self._printer.same(one, seen[key])
            else:
                seen[key] = one.index
                missing.append(one)
        return missing

    def _size_of_batches(self, model: Description) -> int:
        """Return one batch shape for the whole plan, so that a run that goes on makes equal images."""
        if self._config.batch_size != "auto":
            most = self._config.batch_size
        else:
            large = model.parameters >= LARGE
            most = 1 if large else MOST_BATCH
        size = most if self._whole_batches else min(most, len(self._planned))
        self._events.detail(f"batch size {size}")
        return size

    def _batches(self) -> Iterator[list[Planned]]:
        """Put together what can share a batch: size, steps, guidance and length of prompts are equal.

        Of the whole plan, whatever of it is there already: an image has the same place in its batch in a run that goes
        on. A batch has one shape; what lacks is filled up by its last job.
        """
        groups: dict[tuple[Any, ...], list[Planned]] = {}
        for one in self._planned:
            job = one.job
            alike = (job.width, job.height, job.steps, job.guidance, one.chunks)
            groups.setdefault(alike, []).append(one)
        for group in groups.values():
            for start in range(0, len(group), self._batch_size):
                batch = group[start : start + self._batch_size]
                yield batch + batch[-1:] * (self._batch_size - len(batch))

    # ---- making

    def _make(self, missing: Sequence[Planned], family: StableDiffusion, choice: Choice) -> int:
        """Make images; returns how many are left when time is over."""
        from dbcap.generation.renderer import Renderer

        renderer = Renderer(family, self._given, self._config, self._events)
        renderer.prepare(self._planned)
        how = {"device": choice.device, "dtype": choice.dtype, "threads": choice.threads}
        self._gallery.open({**how, "batch_size": self._batch_size})
        total = sum(one.job.steps for one in missing)
        todo = {one.index for one in missing}
        with self._events.track("Generating", total, "steps") as tracker:
            for batch in self._batches():
                if not todo.intersection(one.index for one in batch):
                    continue
                if self._deadline is not None and time.monotonic() >= self._deadline:
                    return len(todo)
                self._make_batch(renderer, batch, todo, tracker)
                todo.difference_update(one.index for one in batch)
        return 0

    def _make_batch(self, renderer: Renderer, batch: Sequence[Planned], todo: set[int], tracker: Tracker) -> None:
        """Make a whole batch, and write those of its images that are still to be made."""
        start = time.monotonic()
        wanted = {one.index: row for row, one in reversed(list(enumerate(batch))) if one.index in todo}
        if self._row is not None:
            wanted = {batch[0].index: self._row}
        latents = renderer.latents(batch, lambda: tracker.advance(len(wanted)))
        seconds = round((time.monotonic() - start) / len(wanted), 3)
        for row in sorted(wanted.values()):
            try:
                path, facts = self._gallery.write(batch[row], row, renderer.pixels(latents[row]), seconds)
            except UnfitError as error:
                self._fail(batch[row], error)
                continue
            self._made += 1
            self._printer.made(batch[row], path, facts)

    def _fail(self, one: Planned, error: UnfitError) -> None:
        self._failed += 1
        about = f"the image of seed {one.job.seed} failed: {error.message}"
        if self._config.on_error == "stop":
            raise DbcapError(about, error.hint)
        self._events.fail(f"{about}; {error.hint}")
        self._printer.failed(one)
