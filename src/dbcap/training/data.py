"""What a micro-batch holds, drawn by its number alone, and Lightning's DataModule that yields them."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dbcap.training import losses, randomness
from dbcap.training.latents import Latent

INSTANCE, CLASS = "instance", "class"
_PARENT_DEATH_SIGNAL = 1
"""Of Linux's prctl. Elsewhere workers are not forked, and hold nothing of their parent's."""


@dataclass(frozen=True)
class Batch:
    """Rows of the subject, then as many of the class, or none. R rows."""

    clean: torch.Tensor
    """(R, C, h, w) float32."""
    noise: torch.Tensor
    """(R, C, h, w) float32."""
    times: torch.Tensor
    """(R,) int64."""
    captions: torch.Tensor
    """(R,) int64: which of the run's captions."""
    instances: int
    """How many rows are of the subject."""
    number: int
    """Of the micro-batch, counted from the run's beginning."""

    def to(self, device: torch.device) -> Batch:
        """Return it on a device; Lightning calls it."""
        clean, noise, times, captions = (one.to(device) for one in (self.clean, self.noise, self.times, self.captions))
        return Batch(clean, noise, times, captions, self.instances, self.number)


@dataclass(frozen=True)
class Shown:
    """A picture in training: the latents of its views, and the number of its caption."""

    views: tuple[Latent, ...]
    caption: int


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn."""

    seed: int
    batch_size: int
    times: int
    """Timesteps of the noise schedule."""
    offset_noise: float


class Micro(IterableDataset[Batch]):
    """Micro-batches from number `start` on, without end."""

    def __init__(self, photos: Sequence[Shown], classes: Sequence[Shown], drawing: Drawing, start: int) -> None:
        self._streams = {INSTANCE: photos, **({CLASS: classes} if classes else {})}
        self._drawing, self._start = drawing, start

    def __iter__(self) -> Iterator[Batch]:
        """Yield them; of several workers each yields its share, which the loader puts in order again."""
        worker = get_worker_info()
        number, step = self._start + (worker.id if worker else 0), worker.num_workers if worker else 1
        while True:
            yield self.batch(number)
            number += step

    def batch(self, number: int) -> Batch:
        """Return one by its number."""
        size = self._drawing.batch_size
        rows = [self._row(stream, number * size + row) for stream in self._streams for row in range(size)]
        clean, noise, times, captions = zip(*rows, strict=True)
        return Batch(torch.stack(clean), torch.stack(noise), torch.tensor(times), torch.tensor(captions), size, number)

    def _row(self, stream: str, sample: int) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Return clean latents, noise, time and caption of sample number `sample` of a stream."""
        shown, how = self._streams[stream], self._drawing
        one = shown[randomness.place(how.seed, stream, sample, len(shown))]
        drawn = randomness.generator(how.seed, stream, sample)
        view = one.views[int(torch.randint(len(one.views), (), generator=drawn))]
        time = int(torch.randint(how.times, (), generator=drawn))
        clean = view.drawn(torch.randn(view.mean.shape, generator=drawn))
        noise = torch.randn(view.mean.shape, generator=drawn)
        if how.offset_noise:
            shift = torch.randn((1, len(noise), 1, 1), generator=drawn)
            noise = losses.offset(noise[None], shift, how.offset_noise)[0]
        return clean, noise, time, one.caption


class Data(pl.LightningDataModule):
    """Gives the trainer micro-batches from where the run stands."""

    def __init__(
        self, photos: Sequence[Shown], classes: Sequence[Shown], drawing: Drawing, *, accumulate: int, workers: int
    ) -> None:
        super().__init__()
        self.photos, self.classes, self.drawing = photos, classes, drawing
        self._accumulate, self._workers = accumulate, workers

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return a loader that begins at the trainer's step."""
        start = self.trainer.global_step * self._accumulate if self.trainer else 0
        micro = Micro(self.photos, self.classes, self.drawing, start)
        count = self._workers
        return DataLoader(
            micro, batch_size=None, num_workers=count, persistent_workers=count > 0, worker_init_fn=_end_with_parent
        )


def _end_with_parent(_: int) -> None:
    """Have a worker end just when its parent does: it holds the parent's open files, and with them the run's lock."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to it as well
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
