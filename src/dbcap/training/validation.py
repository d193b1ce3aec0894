"""Losses on fixed pictures with fixed noise at fixed times: what can be compared from one step to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dbcap.training import randomness
from dbcap.training.data import Batch, Shown
from dbcap.training.module import DreamBooth

TIMES = 4
"""At how many times each picture is seen: in the middle of as many parts of the schedule."""
MOST = 4
"""Pictures of each kind."""
_SEED = 0


@dataclass(frozen=True)
class Value:
    """What a validation found. `value` is what the best checkpoint is chosen by: instance + prior weight * prior."""

    value: float
    instance: float
    prior: float | None


class Validation:
    """Held-out views of the subject, and class images; the same whatever the run's seed."""

    def __init__(self, photos: Sequence[Shown], classes: Sequence[Shown], times: int, rows: int) -> None:
        self._batches = {
            kind: list(_batches(kind, shown[:MOST], times, rows))
            for kind, shown in (("instance", photos), ("prior", classes))
            if shown
        }

    @torch.no_grad()
    def run(self, module: DreamBooth) -> Value:
        """Return the mean losses, each picture and time counting alike."""
        found = {}
        for kind, batches in self._batches.items():
            errors = [error for batch in batches for error in module.errors(batch.to(module.device)).tolist()]
            found[kind] = sum(errors) / len(errors)
        prior = found.get("prior")
        value = found["instance"] + module.objective.prior_weight * (prior or 0.0)
        return Value(value, found["instance"], prior)


def _batches(kind: str, shown: Sequence[Shown], times: int, rows: int) -> list[Batch]:
    """Return batches of one shape, the last of which is shorter where it must be."""
    made = []
    for number, one in enumerate(shown):
        for part in range(TIMES):
            drawn = randomness.generator(_SEED, "validation", kind, number, part)
            latent = one.views[0]
            clean = latent.drawn(torch.zeros_like(latent.mean))
            noise = torch.randn(latent.mean.shape, generator=drawn)
            made.append((clean, noise, times * (2 * part + 1) // (2 * TIMES), one.caption))
    batches = []
    for start in range(0, len(made), rows):
        clean_rows, noises, at, captions = zip(*made[start : start + rows], strict=True)
        count = len(at)
        batches.append(
            Batch(torch.stack(clean_rows), torch.stack(noises), torch.tensor(at), torch.tensor(captions), count, start)
        )
    return batches
