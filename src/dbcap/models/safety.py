"""The safety checker of Stable Diffusion 1.x: how near CLIP sees a picture to 20 concepts (arXiv:2210.04610)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from dbcap.models import parts
from dbcap.models.libraries import clear_errors, quiet_libraries
from dbcap.models.mapped import MappedWeights
from dbcap.models.pipelines import CHECKER


class SafetyChecker:
    """A checker that is read by `load`, or when it is first used. `opened` gives the weights of a part of `folder`."""

    def __init__(self, folder: Path, model: str, device: torch.device, opened: Callable[[str], MappedWeights]) -> None:
        self._folder, self._model, self._device, self._opened = folder, model, device, opened

    def load(self) -> None:
        """Read it. Raises ModelError for what is missing or damaged."""
        _ = self._processor, self._checker

    @torch.inference_mode()
    def flags(self, pixels: npt.NDArray[np.uint8]) -> bool:
        """Return whether it flags a picture, RGB (height, width, 3). One alone, so that none has mates."""
        with quiet_libraries():  # diffusers tells of a black picture that nobody gets to see
            given = self._processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
            _, (flagged,) = self._checker(given.to(self._device), images=[pixels])
        return bool(flagged)

    @cached_property
    def _processor(self) -> Any:
        with clear_errors(self._model):
            # AutoImageProcessor does not know the names that older files have for this class.
            from transformers import CLIPImageProcessorPil

            return CLIPImageProcessorPil.from_pretrained(self._folder / "feature_extractor", local_files_only=True)

    @cached_property
    def _checker(self) -> Any:
        with clear_errors(self._model):
            from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

        kind, folder, weights = StableDiffusionSafetyChecker, self._folder / CHECKER, self._opened(CHECKER)
        # In float32 whatever the model runs in: it compares to three decimals, and bfloat16 has two or three digits.
        model = parts.transformers_model(kind, folder, weights, f"the {CHECKER} of {self._model}", torch.float32)
        return model.to(self._device)
