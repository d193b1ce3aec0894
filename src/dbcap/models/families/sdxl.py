"""Stable Diffusion XL: two text encoders, and the picture's size told to the denoiser (arXiv:2307.01952)."""

from __future__ import annotations

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
        """Encode a prompt: the last layer but one of both encoders side by side, and the second one's projection."""
        pairs = [
            self._states(tokenizer, encoder, text, chunks, lambda output: output.hidden_states[-2])
            for tokenizer, encoder in zip(self.tokenizers, self._text_encoders(), strict=True)
        ]
        states = torch.cat([states for states, _ in pairs], -1)
        pooled = pairs[1][1].text_embeds[0]
        if not text and self._zeros_for_nothing:
            states, pooled = torch.zeros_like(states), torch.zeros_like(pooled)
        width, height = size
        # Original size, where it was cropped, and size: as of a picture that was trained on whole (section 2.2).
        times = torch.tensor([height, width, 0, 0, height, width], dtype=self.dtype, device=self.device)
        return Condition(states, {"text_embeds": pooled, "time_ids": times})

    @property
    def original_kind(self) -> str:
        """Which of the original layouts it has."""
        return "xl"

    @property
    def _zeros_for_nothing(self) -> bool:
        return bool(read_object(self.folder / PIPELINE).get("force_zeros_for_empty_prompt", True))
