"""From jobs to pixels: prompts encoded once, batches denoised, pictures decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from dbcap.config.models import GenerateConfig
from dbcap.events import Events
from dbcap.generation import sampling, schedulers
from dbcap.generation.jobs import Job, UnfitError
from dbcap.generation.plan import Given, Planned
from dbcap.models.libraries import compiler_errors
from dbcap.models.memory import memory_errors

if TYPE_CHECKING:
    from dbcap.models.families.sd import Condition, StableDiffusion


class Renderer:
    """A model, and what a run asks of it."""

    def __init__(self, family: StableDiffusion, given: Given, config: GenerateConfig, events: Events) -> None:
        self._family, self._given, self._config, self._events = family, given, config, events
        self._conditions: dict[tuple[str, int, tuple[int, int]], Condition] = {}

    def prepare(self, planned: Sequence[Planned]) -> None:
        """Encode every prompt of a plan once, let the text encoder go, and get the other parts ready."""
        if self._config.safety and self._family.safety:
            self._family.safety.load()  # now, not after the first steps, it says what is wrong with its files
        elif self._config.safety:
            self._events.warn(f"{self._family.name} has no safety checker: images are not checked")
        for one in planned:
            for text in (one.job.prompt, one.job.negative):
                key = self._text_key(text, one)
                if key not in self._conditions:
                    self._conditions[key] = self._family.encode(*key)
        self._family.release_text()
        if self._config.low_memory:
            self._family.save_memory()
        if self._config.compile and self._family.exported:
            self._events.say("--compile is left out: torch.compile has no part in the ONNX engine")
        elif self._config.compile:
            self._events.say("torch.compile compiles the denoiser with the first step; that takes a while")
            self._family.compile()

    def latents(self, batch: Sequence[Planned], stepped: Callable[[], None]) -> torch.Tensor:
        """Return latents (B, C, H, W) float32 of jobs that share size, steps, guidance and length of prompts.

        `stepped` is called after each step. Raises DbcapError where memory does not last.
        """
        self._family.check()
        job = batch[0].job
        what = f"{len(batch)} images of {job.width}x{job.height}"
        with memory_errors(what, "use --low-memory, a smaller --batch-size or smaller images"), compiler_errors():
            return self._denoise(batch, stepped)

    def pixels(self, latents: torch.Tensor) -> npt.NDArray[np.uint8]:
        """Decode the latents (C, H, W) of one picture -> RGB (height, width, 3). Raises UnfitError."""
        if not torch.isfinite(latents).all():
            wide = self._family.dtype == torch.float32
            hint = "or a weight of the model or a LoRA is no number" if wide else "or --dtype float32"
            raise UnfitError("its numbers ran out of range", f"use less --guidance, {hint}")
        decoded: npt.NDArray[np.uint8] = self._family.decode(latents).numpy()
        checker = self._family.safety if self._config.safety else None
        if checker and checker.flags(decoded):
            raise UnfitError("the model's safety checker flags it", "use another --seed or prompt")
        return decoded

    @staticmethod
    def _text_key(text: str, one: Planned) -> tuple[str, int, tuple[int, int]]:
        return text, one.chunks, (one.job.width, one.job.height)

    def _denoise(self, rows: Sequence[Planned], stepped: Callable[[], None]) -> torch.Tensor:
        job, family = rows[0].job, self._family
        told = [self._conditions[self._text_key(one.job.prompt, one)] for one in rows]
        against = [self._conditions[self._text_key(one.job.negative, one)] for one in rows]
        return sampling.denoise(
            family,
            schedulers.make(job.scheduler, family.scheduler_config),
            told,
            against if job.guidance > 1 else None,
            [sampling.generator(one.job.seed) for one in rows],
            (family.latent_channels, job.height // family.factor, job.width // family.factor),
            sampling.Settings(job.steps, job.guidance, job.guidance_rescale, job.eta, job.strength),
            device=family.device,
            start=self._start(job),
            stepped=stepped,
        )

    def _start(self, job: Job) -> sampling.Start | None:
        if self._given.init is None:
            return None
        family, size = self._family, (job.width, job.height)
        picture = np.array(self._given.init.resize(size, Image.Resampling.LANCZOS))
        latents = family.encode_picture(torch.from_numpy(picture))
        if self._given.mask is None:
            return sampling.Start(latents)
        white = np.array(self._given.mask.convert("L").resize(size, Image.Resampling.BILINEAR)) >= 128
        small = torch.from_numpy(white).float()[None, None]
        mask = torch.nn.functional.max_pool2d(small, family.factor)[0, 0].to(family.device)
        masked = None
        if family.inpaints:
            masked = family.encode_picture(torch.from_numpy(np.where(white[..., None], 127, picture).astype(np.uint8)))
        return sampling.Start(latents, mask, masked)
