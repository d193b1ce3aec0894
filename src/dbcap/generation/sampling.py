"""From noise to latents: one loop for all samplers, with guidance, image to image and inpainting.

Every image has a generator of its own on the CPU: its first noise and all that a sampler adds later come from it, in
float32, so that neither the batch nor the device changes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from dbcap.generation.schedulers import kept_steps

_WORDS = slice(3, 627)
"""Where the twister's 624 words are in a generator's state, after its seed and where it stands."""


class Denoiser(Protocol):
    """What `denoise` asks of a family."""

    def predict(self, latents: torch.Tensor, time: torch.Tensor, conditions: Sequence[Any]) -> torch.Tensor:
        """(B, C, H, W) float32, B conditions -> (B, C, H, W) float32."""


@dataclass(frozen=True)
class Settings:
    """What a batch has in common."""

    steps: int
    guidance: float
    guidance_rescale: float = 0.0
    eta: float = 0.0
    strength: float = 1.0


@dataclass(frozen=True)
class Start:
    """Where image to image begins: the latents of a picture (C, H, W), and where it may change (H, W), 1 for yes."""

    latents: torch.Tensor
    mask: torch.Tensor | None = None
    masked: torch.Tensor | None = None
    """The latents of the picture without what may change, for denoisers that take them."""


def generator(seed: int) -> torch.Generator:
    """Return the source of all randomness of one image; `seed` is from 0 to 2**64 - 1.

    torch's generator for the CPU, a Mersenne twister, looks at 32 bits of a seed. For larger ones its state is filled
    from all 64, by the initialisation from an array that its authors give.
    """
    low, high = seed & 0xFFFFFFFF, seed >> 32
    made = torch.Generator().manual_seed(low)
    if high:
        words = np.random.RandomState([low, high]).get_state(legacy=False)["state"]["key"]
        state = made.get_state()
        state.view(torch.int64)[_WORDS] = torch.from_numpy(words.astype(np.int64))
        made.set_state(state)
    return made


def noise(generators: Sequence[torch.Generator], shape: tuple[int, int, int]) -> torch.Tensor:
    """Draw (B, *shape) float32, each row from its own generator."""
    return torch.stack([torch.randn(shape, generator=one) for one in generators])


def guided(positive: torch.Tensor, negative: torch.Tensor, guidance: float, rescale: float) -> torch.Tensor:
    """Classifier-free guidance (arXiv:2207.12598, equation 6), rescaled by arXiv:2305.08891, equations 15 and 16.

    Both predictions are (B, C, H, W); `rescale` 0 leaves the deviation as guidance makes it, 1 makes it that of
    `positive`.
    """
    mixed = negative + guidance * (positive - negative)
    if not rescale:
        return mixed
    axes = tuple(range(1, mixed.ndim))
    like = mixed * (positive.std(axes, keepdim=True) / mixed.std(axes, keepdim=True))
    return rescale * like + (1 - rescale) * mixed


@torch.inference_mode()
def denoise(
    denoiser: Denoiser,
    scheduler: Any,
    conditions: Sequence[Any],
    negatives: Sequence[Any] | None,
    generators: Sequence[torch.Generator],
    shape: tuple[int, int, int],
    settings: Settings,
    *,
    device: torch.device,
    start: Start | None = None,
    stepped: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Return latents (B, *shape) float32 of B conditions; without `negatives` there is no guidance.

    `scheduler` is a new one of diffusers; `stepped` is called after each step.
    """
    scheduler.set_timesteps(settings.steps, device=device)
    drawn = noise(generators, shape).to(device)
    times = scheduler.timesteps
    latents: torch.Tensor
    if start is None:
        latents = drawn * scheduler.init_noise_sigma
    else:
        skipped = (settings.steps - kept_steps(settings.steps, settings.strength)) * scheduler.order
        times = times[skipped:]
        if hasattr(scheduler, "set_begin_index"):  # those that count their steps
            scheduler.set_begin_index(skipped)
        latents = _noised(scheduler, start.latents, drawn, times[:1])
    keywords = _keywords(scheduler, generators, settings.eta)
    for number, time in enumerate(times):
        scaled = scheduler.scale_model_input(latents, time)
        prediction = _predict(denoiser, scaled, time, conditions, negatives, settings, start)
        latents = scheduler.step(prediction, time, latents, **keywords).prev_sample
        if start is not None and start.mask is not None and start.masked is None:
            rest = start.latents
            if number + 1 < len(times):
                rest = _noised(scheduler, rest, drawn, times[number + 1 : number + 2])
            latents = start.mask * latents + (1 - start.mask) * rest
        stepped()
    return latents


def _noised(scheduler: Any, latents: torch.Tensor, drawn: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Add noise (B, C, H, W) to the latents (C, H, W) of a picture, as much as there is at a time (1,)."""
    noised: torch.Tensor = scheduler.add_noise(latents.expand_as(drawn), drawn, time.expand(len(drawn)))
    return noised


def _predict(
    denoiser: Denoiser,
    latents: torch.Tensor,
    time: torch.Tensor,
    conditions: Sequence[Any],
    negatives: Sequence[Any] | None,
    settings: Settings,
    start: Start | None,
) -> torch.Tensor:
    if start is not None and start.masked is not None and start.mask is not None:
        rows = len(latents)
        mask = start.mask.expand(rows, 1, *latents.shape[2:])
        latents = torch.cat([latents, mask, start.masked.expand(rows, *start.masked.shape)], 1)
    if negatives is None:
        return denoiser.predict(latents, time, conditions)
    both = denoiser.predict(torch.cat([latents, latents]), time, [*negatives, *conditions])
    negative, positive = both.chunk(2)
    return guided(positive, negative, settings.guidance, settings.guidance_rescale)


def _keywords(scheduler: Any, generators: Sequence[torch.Generator], eta: float) -> dict[str, Any]:
    """Return what this sampler's step understands beyond the common arguments."""
    known = inspect.signature(scheduler.step).parameters
    every = {"generator": list(generators), "eta": eta}
    return {name: value for name, value in every.items() if name in known}
