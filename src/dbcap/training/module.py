"""DreamBooth as a LightningModule: one forward pass over photos and class images, two losses (arXiv:2208.12242)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch.optim.lr_scheduler import LambdaLR

from dbcap.training import losses, randomness
from dbcap.training.data import Batch
from dbcap.training.ema import Average
from dbcap.training.losses import Losses
from dbcap.training.optimizer import Make, MasterOptimizer
from dbcap.training.trainee import Trainee


@dataclass(frozen=True)
class Objective:
    """What is minimised."""

    alphas: torch.Tensor
    """(T,) float32: the share of the picture that is left at each time, squared (alphas_cumprod)."""
    prediction_type: str
    prior_weight: float
    by_prediction: bool
    """Whether the target of class rows is what the base model predicts."""
    min_snr: float | None


@dataclass(frozen=True)
class Rates:
    """The learning rate and how it goes."""

    lr: float
    clip: float
    factor: Callable[[int], float]
    """Step, from 0 -> part of the learning rate."""


class DreamBooth(pl.LightningModule):
    """A model in training."""

    def __init__(
        self, trainee: Trainee, objective: Objective, rates: Rates, make: Make, seed: int, average: Average | None
    ) -> None:
        super().__init__()
        self.trainee, self.objective, self.average = trainee, objective, average
        self._rates, self._make, self._seed = rates, make, seed
        self.parts = torch.nn.ModuleDict(trainee.modules)
        self.best: dict[str, Any] | None = None
        """Step and value of the best validation so far."""

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, torch.Tensor]:  # noqa: ARG002 - Lightning's
        """Return the losses of a micro-batch."""
        with randomness.library_draws(self._seed, "dropout", batch.number):
            found = self.losses(batch)
        return {"loss": found.total, "instance": found.instance.detach(), "prior": found.prior.detach()}

    def losses(self, batch: Batch) -> Losses:
        """Compare what the model predicts with what it should."""
        what, count = self.objective, batch.instances
        predicted, target, noisy = self._predicted(batch)
        if what.by_prediction and count < len(noisy):
            base = self.trainee.base_prediction(noisy[count:], batch.times[count:], batch.captions[count:])
            target = torch.cat([target[:count], base])
        weights = None
        if what.min_snr is not None:
            alphas = what.alphas.to(noisy.device)
            weights = losses.min_snr_weights(alphas, batch.times, what.min_snr, what.prediction_type)
        return losses.dreambooth(predicted, target, weights, count, what.prior_weight)

    def errors(self, batch: Batch) -> torch.Tensor:
        """Return the squared error of each row (R,), as validation compares them: without weights."""
        predicted, target, _ = self._predicted(batch)
        return (predicted - target).square().flatten(1).mean(1)

    def _predicted(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return prediction, target and noised latents, each (R, C, h, w)."""
        alphas = self.objective.alphas.to(batch.clean.device)
        noisy = losses.add_noise(alphas, batch.clean, batch.noise, batch.times)
        predicted = self.trainee.predict(noisy, batch.times, self.trainee.tell(batch.captions))
        target = losses.target(self.objective.prediction_type, alphas, batch.clean, batch.noise, batch.times)
        return predicted, target, noisy

    def configure_optimizers(self) -> Any:
        """Return the optimizer and what moves its learning rate."""
        optimizer = MasterOptimizer(self.trainee.weights, self._make, lr=self._rates.lr, clip=self._rates.clip)
        schedule = LambdaLR(optimizer, self._rates.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---- checkpoints hold what is trained, in float32, and nothing else of the model

    def state_dict(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        """Return the trained weights."""
        return self.trainee.weights.state()

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], *_: Any, **__: Any) -> None:
        """Take trained weights."""
        self.trainee.weights.load(state_dict)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the moving average, and what was the best."""
        checkpoint["best"] = self.best
        if self.average:
            checkpoint["ema"] = self.average.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them again."""
        self.best = checkpoint["best"]
        if self.average:
            self.average.load(checkpoint["ema"])
