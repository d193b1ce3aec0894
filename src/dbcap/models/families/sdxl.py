"""Stable Diffusion XL: two text encoders, and the picture's size told to the denoiser (arXiv:2307.01952)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dbcap.models.families.sd import Condition, StableDiffusion
from dbcap.models.layout import PIPELINE, read_object


class StableDiffusionXL(StableDiffusion):
    """A pipeline in a folder."""

    text_parts = (
        ("tokenizer", "text_encoder", CLIPTextModel),
        ("tokenizer_2", "text_encoder_2", CLIPTextModelWithProjection),
    )

    @torch.inference_mode()
    def encode(self, text: str, chunks: int, size: tuple[int, int]) -> Condition:
        """Encode a prompt; of an empty one, where the model says so, zeros."""
        found = super().encode(text, chunks, size)
        if text or not self._zeros_for_nothing:
            return found
        pooled = {"text_embeds": torch.zeros_like(found.added["text_embeds"])}
        return Condition(torch.zeros_like(found.states), found.added | pooled)

    def tell(self, encoders: Sequence[Any], rows: Sequence[torch.Tensor], size: tuple[int, int]) -> Condition:
        """Put the last layer but one of both encoders side by side, and add the second one's projection."""
        outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, rows, strict=True)]
        states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        width, height = size
        # Original size, where it was cropped, and size: as of a picture that was trained on whole (section 2.2).
        times = torch.tensor([height, width, 0, 0, height, width], dtype=self.dtype, device=self.device)
        pooled = outputs[1].text_embeds
        return Condition(states, {"text_embeds": pooled, "time_ids": times.expand(len(pooled), -1)})

    @property
    def original_kind(self) -> str:
        """Which of the original layouts it has."""
        return "xl"

    @property
    def _zeros_for_nothing(self) -> bool:
        return bool(read_object(self.folder / PIPELINE).get("force_zeros_for_empty_prompt", True))
