"""The denoiser on a CPU: packed layers, a gated unit without passes of its own, and attention in blocks.

SD 1.5's size, two rows of 64x64 latents, 2 cores of an AMD EPYC with AVX512-BF16, torch 2.13, seconds a forward pass in
bfloat16: 5.97 as diffusers runs it; 4.9 so, of which attention saves 1.0. The convolutions and linear layers take 3.15
of these, which is what the CPU can do: 1354 GFLOP at 440 a second, its speed in one large product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from torch import nn
from torch.nn import functional

from dbcap.models import cpu
from dbcap.models.packed import can_pack, pack, pack_convolutions, pack_linears

BLOCK = 16 * 2**20
"""Bytes of scores that are made at once."""
SHORT = 128
"""Keys up to which torch's own attention is as fast: those of a prompt."""


class GatedLinear(nn.Module):
    """x -> (x V^T + c) * gelu(x W^T + b), for x (..., K) (GEGLU, arXiv:2002.05202), in two products."""

    def __init__(self, layer: GEGLU) -> None:
        super().__init__()
        (value, gate), bias = layer.proj.weight.detach().chunk(2), layer.proj.bias
        self._value, self._gate = pack(value.contiguous()), pack(gate.contiguous())
        self._biases = (None, None) if bias is None else tuple(one.clone() for one in bias.detach().chunk(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        gate = torch.ops.mkldnn._linear_pointwise(x, self._gate, self._biases[1], "gelu", [], "none")
        return torch.ops.mkldnn._linear_pointwise.binary(x, gate, self._value, self._biases[0], "mul")


class Attend:
    """Attention of diffusers' transformer blocks, scores made in blocks that stay in the cache.

    In bfloat16 torch's kernel keeps scores in float32 and takes 1.6 times as long. Here they are rounded to bfloat16:
    of a denoiser's whole error against float32, 1.297 %, that changes the last digit.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend: (B, S, C), and (B, T, E) if it is to something else -> (B, S, C)."""
        told = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, told), (attn.to_v, told))
        )
        if key.shape[2] <= SHORT or attention_mask is not None:
            attended = functional.scaled_dot_product_attention(query, key, value, attention_mask)
        else:
            attended = in_blocks(query, key, value)
        joined: torch.Tensor = attn.to_out[0](attended.transpose(1, 2).flatten(2))
        return joined


def in_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return softmax(Q K^T / sqrt(D)) V for query (B, H, S, D), key and value (B, H, T, D) -> (B, H, S, D)."""
    size = query.shape[-1]
    scaled, keys, values = (query * size**-0.5).flatten(0, 1), key.flatten(0, 1).mT, value.flatten(0, 1)
    places = max(1, BLOCK // (keys.shape[0] * keys.shape[2] * keys.element_size()))
    attended = torch.empty_like(scaled)
    # One piece of memory for all blocks: new ones of this size would come from the system, page by page.
    memory = scaled.new_empty(keys.shape[0], min(places, scaled.shape[1]), keys.shape[2])
    for start in range(0, scaled.shape[1], places):
        rows = scaled[:, start : start + places]
        scores = torch.bmm(rows, keys, out=memory[:, : rows.shape[1]])
        attended[:, start : start + places] = torch.bmm(torch.softmax(scores, -1, out=scores), values)
    return attended.view(query.shape)


def speed_up(unet: nn.Module, release: Callable[[], None]) -> None:
    """Replace layers of a UNet on a CPU. `release` is called when what was read of a file is not needed any more."""
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            _speed_up(module)
    if can_pack(next(unet.parameters())):
        pack_linears(unet, release)
        pack_convolutions(unet, release)


def _speed_up(block: BasicTransformerBlock) -> None:
    first = block.ff.net[0]
    if isinstance(first, GEGLU) and can_pack(first.proj.weight):
        block.ff.net[0] = GatedLinear(first)
    if next(block.parameters()).dtype == torch.bfloat16 and cpu.cpu_class() != "amx":  # there torch's kernel uses AMX
        for attention in (block.attn1, block.attn2):
            if attention is not None and _plain(attention):
                attention.set_processor(cast(Any, Attend()))


def _plain(attention: Any) -> bool:
    """Return whether it does nothing but what `Attend` does."""
    more = ("norm_q", "norm_k", "norm_cross", "group_norm", "spatial_norm", "added_kv_proj_dim")
    return not any(getattr(attention, name) for name in more) and not attention.residual_connection
