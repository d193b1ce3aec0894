"""Pictures made on the way: fixed seeds and prompts, of the subject and of its class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from dbcap.files import open_atomic
from dbcap.generation import sampling, schedulers
from dbcap.models.families.sd import Condition
from dbcap.training.trainee import Trainee

if TYPE_CHECKING:
    from dbcap.models.families.sd import StableDiffusion

EACH = 2
"""Pictures of each kind."""
STEPS = 20


@dataclass(frozen=True)
class Wanted:
    """What is to be shown: the numbers of captions among those of the run."""

    captions: dict[str, int]
    """File name, without its number -> caption."""
    negative: int
    size: int
    guidance: float


class _InTraining:
    """The model as it is, for the sampler."""

    def __init__(self, trainee: Trainee) -> None:
        self._trainee = trainee

    def predict(self, latents: torch.Tensor, time: torch.Tensor, conditions: Sequence[int]) -> torch.Tensor:
        """Predict for rows whose conditions are numbers of captions."""
        told: Condition = self._trainee.tell(torch.tensor(list(conditions)))
        return self._trainee.predict(latents, time, told)


@torch.no_grad()
def make(trainee: Trainee, decoder: StableDiffusion, wanted: Wanted, folder: Path) -> None:
    """Write KIND-N.png into a folder. `decoder` is a family object whose autoencoder decodes."""
    family = trainee.family
    side = wanted.size // family.factor
    for kind, caption in wanted.captions.items():
        latents = sampling.denoise(
            _InTraining(trainee),
            schedulers.make("dpm++", family.scheduler_config),
            [caption] * EACH,
            [wanted.negative] * EACH if wanted.guidance > 1 else None,
            [sampling.generator(seed) for seed in range(EACH)],
            (family.latent_channels, side, side),
            sampling.Settings(STEPS, wanted.guidance),
            device=family.device,
        )
        for number, latent in enumerate(latents):
            with open_atomic(folder / f"{kind}-{number}.png") as file:
                Image.fromarray(decoder.decode(latent).numpy()).save(file, "PNG")
