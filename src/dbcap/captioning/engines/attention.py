"""Attention of an encoder in bfloat16 on a CPU, where torch's own kernel takes a fifth of the encoder's time.

Image by image, so that the scores (heads x positions x positions) stay in the cache, and with scores in float32, as in
that kernel: scores rounded to bfloat16 are faster still, and double the error. Measured on 2 cores of an AMD EPYC with
AVX512-BF16, torch 2.13, 8 images, 197 positions, 12 heads of 64: 6.9 ms by `scaled_dot_product_attention`, 4.8 ms so
(3.0 ms with rounded scores); in float32 both take 7 ms, so there torch's kernel stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

NAME = "dbcap"


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend as transformers asks its attention functions to: three of (B, H, S, D) -> (B, S, H, D), and no weights."""
    images, heads, places, size = query.shape
    if attention_mask is not None or key.shape != query.shape:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = size**-0.5 if scaling is None else scaling
    attended = query.new_empty(images, places, heads, size)
    scores = query.new_empty(heads, places, places, dtype=torch.float32)
    chances = torch.empty_like(scores)
    for image in range(images):
        torch.baddbmm(scores, query[image].float(), key[image].float().transpose(1, 2), beta=0, alpha=scale, out=scores)
        torch.softmax(scores, -1, out=chances)
        attended[image] = torch.bmm(chances.to(value.dtype), value[image].contiguous()).transpose(0, 1)
    return attended, None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
