"""Writers of tiny real diffusion pipelines: diffusers' own classes with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
)

from dbcap.testing.models import WORDS

LENGTH = 16
"""Tokens that the tiny models read, marks included."""
SIZE = 32
"""Pixels of their pictures."""
_WIDTH = 32


def write_diffusion(
    folder: Path, *, xl: bool = False, seed: int = 0, inpaints: bool = False, safety: float | None = None
) -> Path:
    """Write a Stable Diffusion pipeline, or one of XL, that makes pictures of 32x32 noise; returns `folder`.

    The autoencoder has a factor of 4; `inpaints` gives the denoiser the five more channels of inpainting models.
    `safety` adds a safety checker that flags pictures above this cosine: -2 flags all, 2 none. XL has none.
    """
    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=_WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    common = {"vae": vae, "unet": _unet(xl, inpaints), "scheduler": scheduler, "tokenizer": tokenizer}
    if xl:
        pipeline: Any = StableDiffusionXLPipeline(
            **common,
            text_encoder=CLIPTextModel(text),
            tokenizer_2=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(text),
        )
    else:
        pipeline = StableDiffusionPipeline(
            **common,
            text_encoder=CLIPTextModel(text),
            safety_checker=None if safety is None else _checker(safety),
            feature_extractor=None if safety is None else _processor(),
            requires_safety_checker=safety is not None,
        )
    pipeline.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(["<start>", "<end>", *WORDS, "sks", "v"])}
    plain = Tokenizer(WordLevel(words, unk_token="v"))
    plain.pre_tokenizer = Whitespace()
    around = [("<start>", 0), ("<end>", 1)]
    plain.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=around)
    marks = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>", "unk_token": "v"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, model_max_length=LENGTH, **marks)


def _checker(threshold: float) -> StableDiffusionSafetyChecker:
    vision = {
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE // 2,
        "patch_size": 4,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=_WIDTH))
    for embeddings in (checker.concept_embeds, checker.special_care_embeds):
        torch.nn.init.normal_(embeddings)
    for thresholds in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        torch.nn.init.constant_(thresholds, threshold)
    return checker


def _processor() -> CLIPImageProcessorPil:
    side = SIZE // 2
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _unet(xl: bool, inpaints: bool) -> UNet2DConditionModel:
    added: dict[str, Any] = {}
    if xl:
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": _WIDTH + 6 * 8,
        }
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=9 if inpaints else 4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=2 * _WIDTH if xl else _WIDTH,
        **added,
    )
