"""What is predicted of noised latents, how much each time counts, and the loss of DreamBooth.

Shapes: latents are (B, C, H, W), times (B,) whole numbers from 0 to T - 1, `alphas_cumprod` (T,) float32: how much of
the picture's variance is left at each time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def add_noise(alphas_cumprod: Tensor, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Return the latents at their times: sqrt(a) clean + sqrt(1 - a) noise (DDPM, arXiv:2006.11239, equation 4)."""
    signal, rest = _roots(alphas_cumprod, times, clean)
    return signal * clean + rest * noise


def target(prediction_type: str, alphas_cumprod: Tensor, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Return what the denoiser is to predict (B, C, H, W).

    "epsilon" is the noise, "sample" the clean latents, and "v_prediction" the velocity, sqrt(a) noise - sqrt(1 - a)
    clean (arXiv:2202.00512, section 4).
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return clean
    if prediction_type != "v_prediction":
        raise ValueError(f"there is no prediction type {prediction_type!r}")
    signal, rest = _roots(alphas_cumprod, times, clean)
    return signal * noise - rest * clean


def snr(alphas_cumprod: Tensor, times: Tensor) -> Tensor:
    """Return the ratio of signal to noise (B,): a / (1 - a) (arXiv:2107.00630)."""
    left = alphas_cumprod[times]
    return left / (1 - left)


def min_snr_weights(alphas_cumprod: Tensor, times: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Return how much each row counts (B,), by Min-SNR (arXiv:2303.09556).

    That is min(SNR, gamma) for the error of the clean latents; in terms of the noise's that divided by SNR, of the
    velocity's by SNR + 1.
    """
    ratio = snr(alphas_cumprod, times)
    if prediction_type == "epsilon":
        return (gamma / ratio).clamp(max=1)  # so that it is a number too where no signal is left
    if prediction_type == "sample":
        return ratio.clamp(max=gamma)
    if prediction_type != "v_prediction":
        raise ValueError(f"there is no prediction type {prediction_type!r}")
    return ratio.clamp(max=gamma) / (ratio + 1)


def offset(noise: Tensor, drawn: Tensor, strength: float) -> Tensor:
    """Return noise (B, C, H, W) with `strength` times `drawn` (B, C, 1, 1) all over each channel.

    With it a model learns to make dark and bright pictures (N. Guttenberg, Diffusion with Offset Noise, 2023).
    """
    return noise + strength * drawn


@dataclass(frozen=True)
class Losses:
    """The loss of a batch and its two halves, each ()."""

    total: Tensor
    instance: Tensor
    prior: Tensor
    """Without its weight; 0 where there are no class images."""


def dreambooth(
    prediction: Tensor, target: Tensor, weights: Tensor | None, instances: int, prior_weight: float
) -> Losses:
    """Return the loss of DreamBooth (arXiv:2208.12242, equation 2): instance + prior_weight * prior.

    `prediction` and `target` are (B, C, H, W): the first `instances` rows are the subject's, the others, as many or
    none, the class's. `weights` (B,) is how much each row counts, alike with None. A half is the mean over its own rows
    of weight times squared error, so that neither sees the other's weights; in float32 whatever the inputs are.
    """
    errors = (prediction.float() - target.float()).square().flatten(1).mean(1)
    if weights is not None:
        errors = weights * errors
    instance = errors[:instances].mean()
    if instances == len(errors):
        return Losses(instance, instance, torch.zeros_like(instance))
    prior = errors[instances:].mean()
    return Losses(instance + prior_weight * prior, instance, prior)


def _roots(alphas_cumprod: Tensor, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(a) and sqrt(1 - a), each (B, 1, 1, 1)."""
    left = alphas_cumprod[times].view(-1, *[1] * (like.ndim - 1))
    return left.sqrt(), (1 - left).sqrt()
