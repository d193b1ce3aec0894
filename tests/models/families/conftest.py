"""The pipelines of diffusers that families are compared with."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline


@pytest.fixture(scope="session")
def their_sd(tiny_diffusion):
    return StableDiffusionPipeline.from_pretrained(tiny_diffusion, dtype=torch.float32)


@pytest.fixture(scope="session")
def their_xl(tiny_xl):
    return StableDiffusionXLPipeline.from_pretrained(tiny_xl, dtype=torch.float32)
