"""The whole way of `dbcap caption`: discover > read > prepare > generate > write > report."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbcap.captioning import records, sinks
from dbcap.captioning.journal import Failure
from dbcap.captioning.plan import Job, make_plan
from dbcap.captioning.records import LINE_FORMATS
from dbcap.config.models import CaptionConfig, CommonConfig
from dbcap.errors import OK, PARTIAL, SIGINT, DbcapError, InputError, Interrupted
from dbcap.events import Events, Silent, Tracker
from dbcap.files import working_folder
from dbcap.inputs import Source, shown
from dbcap.plugins import loader
from dbcap.plugins.api import Candidate, Record, Writer
from dbcap.web import without_credentials

if TYPE_CHECKING:
    from dbcap.captioning.reading import Prepared
    from dbcap.models.device import Choice
    from dbcap.models.hub import LocalModel
    from dbcap.plugins.api import Captioner


@dataclass(frozen=True)
class CaptionReport:
    """What came of a run."""

    captioned: int = 0
    failed: int = 0
    skipped: int = 0
    output: str | None = None
    """The file; empty for places beside the images, None for stdout, where the captions speak for themselves."""
    note: str = ""

    @property
    def exit_code(self) -> int:
        """0, or 3 when inputs failed."""
        return PARTIAL if self.failed else OK

    @property
    def summary(self) -> str:
        """One line for stderr; empty where the captions themselves say it all."""
        if self.note:
            return self.note
        if self.output is None and not (self.failed or self.skipped):
            return ""
        parts = [f"{self.captioned} captioned", f"{self.failed} failed"]
        if self.skipped:
            parts.append(f"{self.skipped} skipped (they have a caption; --existing overwrite makes them anew)")
        return ", ".join(parts) + (f": {self.output}" if self.output else "")


def run(config: CaptionConfig, common: CommonConfig, events: Events) -> CaptionReport:
    """Caption images as `dbcap caption` does. Raises DbcapError; failed inputs are counted in the report."""
    with ExitStack() as stack:
        job = make_plan(config, events, stack)
        if job is None:
            return CaptionReport(note=f"{shown(str(config.output))} is finished already, and left as it is")
        return _Run(config, common, events, job).run()


class _Run:
    """One run, from the loaded model to the report."""

    def __init__(self, config: CaptionConfig, common: CommonConfig, events: Events, job: Job) -> None:
        self._config = config
        self._common = common
        self._events = events
        self._job = job
        self._done = job.progress.done if job.progress else 0
        self._failed = 0
        self._captioned = 0

    def run(self) -> CaptionReport:
        """Caption everything that is to be done."""
        job, config = self._job, self._config
        earlier = job.progress.failures if job.progress else []
        self._failed, self._captioned = len(earlier), self._done - len(earlier)
        prepared: Generator[Prepared]
        if (job.progress and job.progress.settings) or any(not source.error for source in job.todo):
            self._load()
            self._sink = self._open_sink(self._settings())
            prepared = self._prepared()
        else:  # there is nothing for a model to do
            self._batch_size = 1
            self._sink = self._open_sink({})
            prepared = (_failed(source) for source in job.todo)
        job.errors.start(earlier)
        self._caption_all(prepared)
        output = "" if job.placed else config.output if config.output != "-" else None
        return CaptionReport(self._captioned, self._failed, job.existing, output)

    def _load(self) -> None:
        """Find and load the model, and settle how it runs."""
        from dbcap.captioning import decoding, loader, reading
        from dbcap.config.paths import cache_dir
        from dbcap.models import hub

        config, common, events = self._config, self._common, self._events
        local = hub.locate(
            config.model,
            kind=loader.kind_for(config.engine),
            offline=common.offline,
            allow_pickle=common.allow_pickle,
            events=events,
            home=cache_dir(),
        )
        ready = loader.load(
            local,
            events,
            engine=config.engine,
            device=config.device,
            dtype=config.dtype,
            batch_size=config.batch_size,
            compiled=config.compile,
        )
        choice = ready.choice
        self._local: LocalModel = local
        self._choice: Choice = choice
        self._captioner: Captioner = ready.captioner
        self._decoding = decoding.settle(
            config, self._captioner.defaults(), self._captioner.capabilities, local.spec.text
        )
        ready.check(self._decoding.as_dict())
        # The shape of a batch is one for the whole run and its resumes: kernels round differently at other shapes.
        count = len(self._job.found.sources)
        size = choice.batch_size if config.batch_size != "auto" else reading.evenly(count, choice.batch_size)
        self._batch_size = min(size, count)

    def _settings(self) -> dict[str, Any]:
        """Return everything that decides the bytes of the output."""
        config = self._config
        text = ("format", "with_filename", "prefix", "suffix", "template", "replace", "alpha", "max_pixels", "seed")
        return {
            "inputs": list(config.inputs),
            "folder": working_folder(),
            "model": self._local.spec.text,
            "revision": self._local.revision,
            "device": self._choice.device.partition(":")[0],
            "dtype": self._choice.dtype,
            "batch size": self._batch_size,
            "compile": config.compile,
            **self._decoding.as_dict(),
            **{name: list(value) if isinstance(value := getattr(config, name), tuple) else value for name in text},
        }

    def _open_sink(self, settings: Mapping[str, Any]) -> sinks.Sink:
        job, config = self._job, self._config
        if job.placed:
            return sinks.Beside(job.placed, config.existing)
        writer = self._writer()
        if job.write:
            return sinks.Stream(writer, job.write)
        assert job.journal
        if job.progress:
            sinks.refuse_other_settings(job.progress.settings, settings)
            name = shown(str(config.output))
            self._events.say(f"going on with {name}: {self._done} of {len(job.found.sources)} are done")
        else:
            job.journal.start(settings, job.found.sources, job.found.single)
        return sinks.Resumable(job.journal, writer, job.progress)

    def _writer(self) -> Writer:
        config = self._config
        with_path = not self._job.found.single if config.with_filename is None else config.with_filename
        base = Path(config.output or ".").parent
        if config.format == "metadata":
            table = records.Metadata(base)
            if self._job.journal and self._job.journal.output.is_file():  # --force replaces our rows, not the others
                table.keep(self._job.journal.output, self._job.found.sources)
            return table
        if config.format in LINE_FORMATS:
            return LINE_FORMATS[config.format](with_path=with_path, base=base)
        return loader.writers()[config.format]()

    def _prepared(self) -> Generator[Prepared]:
        from dbcap.captioning import reading

        def work(source: Source) -> Prepared:
            return reading.prepare(source, self._config, self._captioner.prepare)

        ahead = self._config.workers + 2 * self._batch_size
        return reading.in_order(self._job.todo, work, min(self._config.workers, len(self._job.todo)), ahead)

    def _caption_all(self, prepared: Generator[Prepared]) -> None:
        from dbcap.captioning import reading

        total = self._done + len(self._job.todo)
        try:
            with closing(prepared), self._talk().track("Captioning", len(self._job.todo)) as tracker:
                for group in reading.groups(prepared, self._batch_size):
                    self._do(group, tracker)
            self._sink.finish()
        except (KeyboardInterrupt, Interrupted) as error:
            self._sink.close()
            code = error.exit_code if isinstance(error, Interrupted) else SIGINT
            raise Interrupted(code, self._state(total)) from None
        except BaseException:
            self._sink.close()
            raise

    def _state(self, total: int) -> str:
        """Say what an interruption leaves; a journal without anything done is removed."""
        journal, done, again = self._job.journal, self._done, ""
        if journal and journal.exists():
            done = journal.read().done  # a batch may be on disk and not yet counted
            if done:
                again = "; the same command with --resume goes on"
            else:
                journal.forget()
        return f"{done} of {total} are done{again}"

    def _talk(self) -> Events:
        """Return whom to tell about progress: a bar and captions on one terminal would write into each other."""
        return Silent() if self._job.write and sinks.on_terminal(self._job.write) else self._events

    def _do(self, group: Sequence[Prepared], tracker: Tracker) -> None:
        """Caption one batch, write it, and report what failed."""
        stop = next((item for item in group if item.error and self._config.on_error == "stop"), None)
        if stop:
            # A file that goes on with --resume must have its batches where an uninterrupted run has them.
            group = [] if self._job.journal else group[: list(group).index(stop)]
        good = [item for item in group if not item.error]
        rows = list(zip((item.source for item in good), self._records(good), strict=True)) if good else []
        failures = [(item.source, item.error) for item in group if item.error]
        as_written = [_failure(source, error) for source, error in failures]
        failures += self._sink.write(rows, self._done + len(group), as_written) if group else []
        self._done += len(group)
        captioned = len(group) - len(failures)
        self._captioned += captioned
        tracker.advance(captioned)
        for source, error in failures:
            self._fail(source, error, tracker)
        if stop:
            assert stop.error
            failures.append((stop.source, stop.error))
            self._job.errors.add(_failure(stop.source, stop.error))
        if failures and self._config.on_error == "stop":
            again = "; the same command with --resume goes on from there" if self._job.journal else ""
            raise DbcapError(_about(*failures[0]), f"stopped there, as --on-error stop says{again}")

    def _fail(self, source: Source, error: InputError, tracker: Tracker) -> None:
        self._failed += 1
        tracker.fail()
        self._events.fail(_about(source, error))
        self._job.errors.add(_failure(source, error))

    def _records(self, good: Sequence[Prepared]) -> list[Record]:
        import numpy as np

        from dbcap.models.memory import memory_errors

        try:
            pixels = np.stack([item.pixels for item in good if item.pixels is not None])
        except ValueError as error:
            raise DbcapError(
                f"{self._config.model} makes images of different shapes: they cannot share a batch",
                "use --batch-size 1",
            ) from error
        seeds = [image_seed(self._config.seed, item.sha256) for item in good]
        missing = self._batch_size - len(good)  # one shape for all batches of a run
        pixels = np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)])
        seeds += seeds[-1:] * missing
        what = f"{len(pixels)} images x {self._decoding.num_beams} beams"
        with memory_errors(what, "use a smaller --batch-size or fewer beams"):
            found = self._captioner.generate(pixels, self._decoding.as_dict(), seeds)
        if len(found) != len(pixels):
            raise DbcapError(f"{self._config.model} gave {len(found)} captions for a batch of {len(pixels)} images")
        return [self._record(item, candidates) for item, candidates in zip(good, found, strict=False)]

    def _record(self, item: Prepared, candidates: Sequence[Candidate]) -> Record:
        texts = tuple(Candidate(self._dressed(c.text, item.source), c.score) for c in candidates)
        return Record(
            item.source.name, item.sha256, item.width, item.height, texts, self._local.spec.text, self._config.seed
        )

    def _dressed(self, text: str, source: Source) -> str:
        """Apply --replace, --template, --prefix and --suffix, in this order."""
        from dbcap.captioning.reading import stem_of

        config = self._config
        for pair in config.replace:
            old, _, new = pair.partition("=")
            text = text.replace(old, new)
        parts = {"{stem}": stem_of(source), "{caption}": text}
        text = re.sub("{stem}|{caption}", lambda match: parts[match[0]], config.template)
        return f"{config.prefix}{text}{config.suffix}"


def _failed(source: Source) -> Prepared:
    from dbcap.captioning.reading import Prepared

    return Prepared(source, error=source.error)


def image_seed(seed: int, sha256: str) -> int:
    """Return the seed of one image's sampling, from the run's seed and the image's content: below 2**63."""
    digest = hashlib.sha256(f"{seed}:{sha256}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _failure(source: Source, error: InputError) -> Failure:
    return source.name, error.kind, str(error)


def _about(source: Source, error: InputError) -> str:
    """Return one line about a failed input; passwords in URLs are nobody's business."""
    name = shown(source.name)
    text = str(error) if name in error.message else f"{name}: {error}"
    return text.replace(name, without_credentials(name)) if source.is_url else text
