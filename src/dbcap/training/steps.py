"""What happens after each step, in this order: average, validate, log, show pictures, write a checkpoint, stop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from safetensors import SafetensorError

from dbcap import runs
from dbcap.errors import DbcapError
from dbcap.events import Events, Tracker
from dbcap.models import cpu
from dbcap.training import checkpoint
from dbcap.training.data import Batch
from dbcap.training.metrics import Table
from dbcap.training.module import DreamBooth
from dbcap.training.optimizer import MasterOptimizer
from dbcap.training.signals import Signals, StoppedError
from dbcap.training.validation import Validation

EXPLODED = 100.0
"""A loss that training never recovers from: a model that predicts nothing at all has 1."""


@dataclass(frozen=True)
class Every:
    """Steps between one and the next; 0 is never."""

    checkpoint: int
    validation: int
    samples: int
    keep: int


class Steps(pl.Callback):
    """Does what is due. `show` makes pictures of a step."""

    def __init__(
        self,
        run: runs.Run,
        every: Every,
        events: Events,
        tracker: Tracker,
        table: Table,
        validation: Validation,
        show: Callable[[int], None],
        signals: Signals,
        deadline: float | None,
    ) -> None:
        self._run, self._every, self._events, self._tracker, self._table = run, every, events, tracker, table
        self._validation, self._show, self._signals, self._deadline = validation, show, signals, deadline
        self._losses: list[tuple[float, float]] = []
        self._began = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Take signals back from Lightning; and make good what a run that was killed had no time for."""
        self._signals.listen()
        assert isinstance(pl_module, DreamBooth)
        if pl_module.best and pl_module.best["step"] in self._run.steps():
            checkpoint.mark_best(self._run.checkpoints, pl_module.best["step"])
        self._began = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Count a micro-batch; with the last one of a step do what is due."""
        assert isinstance(pl_module, DreamBooth)
        assert isinstance(batch, Batch)
        self._losses.append((float(outputs["instance"]), float(outputs["prior"])))
        if (batch.number + 1) % trainer.accumulate_grad_batches == 0:
            self._end_step(trainer, pl_module)

    def _end_step(self, trainer: pl.Trainer, module: DreamBooth) -> None:
        step, last = trainer.global_step, trainer.global_step == trainer.max_steps
        metrics = self._metrics(trainer, module)
        if metrics["loss"] > EXPLODED:
            raise exploded(step, self._run, f"the loss is {metrics['loss']:.3g}")
        if module.average:
            module.average.update(step)
        better = False
        if _due(step, self._every.validation, last):
            more, better = self._validate(module, step)
            metrics |= more
        with self._writing(f"the metrics of step {step}"):
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step)
        if _due(step, self._every.samples, last):
            self._show(step)
        stops = self._signals.exit_code is not None or self._over()
        if _due(step, self._every.checkpoint, last) or last or stops or better or self._signals.checkpoint:
            self._save(trainer, module, step)
        self._tracker.advance()
        if stops and not last:
            raise StoppedError(self._signals.exit_code)

    def _metrics(self, trainer: pl.Trainer, module: DreamBooth) -> dict[str, float]:
        """Return what is known of the step, and show it."""
        instance, prior = (sum(one) / len(self._losses) for one in zip(*self._losses, strict=True))
        self._losses.clear()
        optimizer = trainer.optimizers[0]
        assert isinstance(optimizer, MasterOptimizer)
        seconds, self._began = time.monotonic() - self._began, time.monotonic()
        found = {"loss": instance + module.objective.prior_weight * prior, "instance": instance, "prior": prior}
        found |= {"lr": optimizer.lr_used, "grad_norm": optimizer.norm, "seconds": seconds}
        memory = cpu.peak_bytes()
        words = f"instance {instance:.3f} prior {prior:.3f} lr {optimizer.lr_used:.1e}"
        self._tracker.note(words + (f" {memory / 1e9:.1f} GB" if memory else ""))
        return found

    def _validate(self, module: DreamBooth, step: int) -> tuple[dict[str, float], bool]:
        """Return what was found, and whether no step before was as good: then it gets a checkpoint."""
        found = self._validation.run(module)
        better = module.best is None or found.value < module.best["value"]
        if better:
            module.best = {"step": step, "value": found.value}
        values = {"validation": found.value, "validation_instance": found.instance}
        return values | ({} if found.prior is None else {"validation_prior": found.prior}), better

    def _save(self, trainer: pl.Trainer, module: DreamBooth, step: int) -> None:
        """Write a checkpoint, and only then what it makes superfluous goes."""
        self._signals.checkpoint = False
        folder = self._run.checkpoints
        place = checkpoint.place_of(folder, step)
        with self._writing(f"the checkpoint {place}"):
            self._table.save()
            trainer.save_checkpoint(place)
        if module.best and module.best["step"] == step:
            checkpoint.mark_best(folder, step)
        checkpoint.prune(self._run, self._every.keep)
        self._run.update(step=step, best=module.best, changed=runs.now())
        self._events.detail(f"checkpoint of step {step}")

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:  # safetensors tells of a full disk in its own way
            why = getattr(error, "strerror", None) or error
            again = f"make room; `dbcap resume {self._run.name}` goes on from the last checkpoint"
            raise DbcapError(f"cannot write {what}: {why}", again) from error

    def _over(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (step % every == 0 or last)


def exploded(step: int, run: runs.Run, what: str) -> DbcapError:
    """Return what is said of a run that is lost from this step on."""
    kept = list(run.steps())
    where = f"the checkpoint of step {kept[-1]} is kept" if kept else "there is no checkpoint yet"
    another = " and another --name" if kept else ""
    return DbcapError(f"step {step}: {what}", f"{where}; begin again with a smaller --lr{another}")
