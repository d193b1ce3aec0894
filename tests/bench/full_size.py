"""Full-size captioners with random weights, made outside the repository: ViT-B/16 + GPT-2 unless sizes are given."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import dbcap_starter

END = 50256
TOKENS = 16
"""Every caption is forced to this many tokens."""


@contextlib.contextmanager
def folder(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> Iterator[Path]:
    """Write such a model for as long as it is needed, with a tokenizer whose captions nobody reads."""
    with tempfile.TemporaryDirectory(prefix="dbcap-bench-") as name:
        yield write(Path(name) / "model", vision or {}, text or {})


def write(place: Path, vision: dict[str, Any], text: dict[str, Any]) -> Path:
    """Write a model with random weights."""
    end = text.get("vocab_size", END + 1) - 1
    marks = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    halves = ViTConfig(**vision), GPT2Config(add_cross_attention=True, is_decoder=True, **marks, **text)
    torch.manual_seed(0)
    model = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_encoder_decoder_configs(*halves))
    for config in (model.config, model.generation_config):
        for key in ("decoder_start_token_id", *marks):
            setattr(config, key, end)
    model.save_pretrained(place)
    size = halves[0].image_size
    processor: BaseImageProcessor = ViTImageProcessorPil(size={"height": size, "width": size})
    processor.save_pretrained(place)
    starter = Path(dbcap_starter.__file__).parent / "captioner"
    for part in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(starter / part, place / part)
    return place
