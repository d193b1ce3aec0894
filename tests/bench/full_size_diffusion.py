"""A Stable Diffusion 1.5-size pipeline with random weights, in float32 as it is published, outside the repository."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

import dbcap_starter


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Write the pipeline for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="dbcap-bench-") as name:
        yield write(Path(name) / "sd15")


def write(place: Path) -> Path:
    """Write a pipeline with random weights: the sizes of SD 1.5's published configs; what it makes nobody looks at."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(Path(dbcap_starter.__file__).parent / "diffusion" / "tokenizer")
    tokenizer.model_max_length = 77
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    StableDiffusionPipeline(
        vae=vae,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=scheduler,
        tokenizer=tokenizer,
        text_encoder=CLIPTextModel(text),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(place)
    return place
