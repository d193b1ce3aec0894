"""Layers of a denoiser that train faster in bfloat16 on a CPU."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dbcap.training import gradients


class _Convolution(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gradients.Convolution.apply(x, self.weight, self.bias, self.stride, self.padding)


class _GroupNorm(nn.GroupNorm):
    def forward(self, x: torch.Tensor, activate: bool = False) -> torch.Tensor:
        return gradients.Normalise.apply(x, self.weight, self.bias, self.num_groups, self.eps, activate)


class _FeedForward(FeedForward):
    def forward(self, x):
        first, last = self.net[0].proj, self.net[2]
        return gradients.FeedForward.apply(x, first.weight, first.bias, last.weight, last.bias)


class _Resnet(ResnetBlock2D):
    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(self.norm1(input_tensor, True))
        hidden = hidden + self.time_emb_proj(functional.silu(temb))[:, :, None, None]
        hidden = self.conv2(self.dropout(self.norm2(hidden, True)))
        return (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)) + hidden


class _Transformer(Transformer2DModel):
    def _get_output_for_continuous_inputs(self, hidden_states, residual, batch_size, height, width, inner_dim):
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        hidden_states = hidden_states.view(batch_size, height, width, -1).permute(0, 3, 1, 2)
        if not self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        return hidden_states + residual


class Attend:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        told = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, told), (attn.to_v, told))
        )
        if attention_mask is not None:
            attended = functional.scaled_dot_product_attention(query, key, value, attention_mask)
        else:
            attended = gradients.Attention.apply(query, key, value)
        return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))


def checkpointed(module: nn.Module, *given: Any) -> Any:
    def contexts():
        kept = gradients.Kept()
        return kept.first(), kept.again()

    return checkpoint(module, *given, use_reentrant=False, context_fn=contexts)


def speed_up(unet: nn.Module) -> None:
    unet.to(memory_format=torch.channels_last)
    for m in unet.modules():
        if type(m) is nn.Conv2d and m.weight.numel() > 500000:
            m.__class__ = _Convolution
        if type(m) is nn.GroupNorm:
            m.__class__ = _GroupNorm
        if type(m) is GEGLU:
            m.__class__ = _Gated
        if type(m) is ResnetBlock2D:
            m.__class__ = _Resnet
        if type(m) is Transformer2DModel:
            m.__class__ = _Transformer
        if type(m) is Attention:
            m.set_processor(Attend())
    unet.enable_gradient_checkpointing(checkpointed)
