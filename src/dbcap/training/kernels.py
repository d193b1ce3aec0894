"""A denoiser's layers for training in bfloat16 on a CPU."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models import attention as transformer
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dbcap.training import attention, gradients

WEIGHTS = 2**19
"""Weights of a convolution from which it takes much time for what its result takes of memory."""
FEATURES = 2**16
"""Elements of an image's features from which they are normalised by our own function."""
ROWS = 4096
"""Rows from which our own feed-forward layer is faster."""


class Convolution(nn.Conv2d):
    """A convolution by `gradients.Convolution`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        """Convolve: (B, C, H, W) -> (B, D, H', W')."""
        return gradients.Convolution.apply(input, self.weight, self.bias, self.stride, self.padding)


class GroupNorm(nn.GroupNorm):
    """Group normalisation by `gradients.Normalise`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        """Normalise: (B, C, H, W) -> (B, C, H, W)."""
        return _normalise(self, input, activate=False)


class FeedForward(transformer.FeedForward):
    """A gated feed-forward layer by `gradients.FeedForward`, where there are many rows."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Multiply, gate and multiply: (B, S, C) -> (B, S, C)."""
        gate, drop, last = cast(Any, self.net)
        # An adapter may have taken the place of a linear layer since.
        plain = type(gate.proj) is type(last) is nn.Linear and not (self.training and drop.p)
        if not plain or hidden_states[..., 0].numel() < ROWS:
            return super().forward(hidden_states)
        return gradients.FeedForward.apply(hidden_states, gate.proj.weight, gate.proj.bias, last.weight, last.bias)


class Resnet(ResnetBlock2D):
    """diffusers' block without copies to another memory format, normalised and activated by one function."""

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """Convolve twice: (B, C, H, W), the time's embedding (B, E) -> (B, D, H, W)."""
        hidden = self.conv1(_normalise(self.norm1, input_tensor, activate=True))
        hidden = hidden + self.time_emb_proj(functional.silu(temb))[:, :, None, None]
        hidden = self.conv2(self.dropout(_normalise(self.norm2, hidden, activate=True)))
        return hidden + (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor))


class Transformer(Transformer2DModel):
    """diffusers' model without a copy to another memory format."""

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> torch.Tensor:
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        hidden_states = hidden_states.view(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        return residual + (hidden_states if self.use_linear_projection else self.proj_out(hidden_states))


class Attend:
    """Attention of diffusers' transformer blocks by `attention.Attention`."""

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
        if attention_mask is None:
            attended = attention.Attention.apply(query, key, value)
        else:
            attended = functional.scaled_dot_product_attention(query, key, value, attention_mask)
        joined: torch.Tensor = attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))
        return joined


def speed_up(unet: nn.Module) -> None:
    """Give a UNet in bfloat16 on a CPU these layers; another one is left alone. Parameters and their names stay.

    Where gradient checkpointing is on, results that are dear and small are kept from then on.
    """
    parameter = next(unet.parameters())
    if parameter.device.type != "cpu" or parameter.dtype != torch.bfloat16:
        return
    cast(Any, unet).to(memory_format=torch.channels_last)
    for module in unet.modules():
        if type(module) is Attention and _plain_attention(module):
            module.set_processor(cast(Any, Attend()))
        for kind, ours, plain in _LAYERS:
            if type(module) is kind and plain(module):
                module.__class__ = ours
        if getattr(module, "gradient_checkpointing", False):
            cast(Any, module)._gradient_checkpointing_func = checkpointed


def checkpointed(module: nn.Module, *given: Any) -> Any:
    """Run a module; what lies in it is made again in the backward pass, but for results that are dear and small."""
    kept = gradients.Kept()
    return checkpoint(module, *given, use_reentrant=False, context_fn=lambda: (kept, kept))


def _normalise(layer: nn.GroupNorm, x: torch.Tensor, activate: bool) -> torch.Tensor:
    if x.dim() == 4 and x[0].numel() >= FEATURES:
        return gradients.Normalise.apply(x, layer.weight, layer.bias, layer.num_groups, layer.eps, activate)
    normal = functional.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)
    return functional.silu(normal) if activate else normal


def _plain_attention(layer: Attention) -> bool:
    """Return whether it does nothing but what `Attend` does."""
    more = ("norm_q", "norm_k", "norm_cross", "group_norm", "spatial_norm", "added_kv_proj_dim", "residual_connection")
    return not any(getattr(layer, name) for name in more) and layer.rescale_output_factor == 1


def _plain_convolution(layer: nn.Conv2d) -> bool:
    usual = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return usual and not isinstance(layer.padding, str) and layer.weight.numel() >= WEIGHTS


def _plain_feed_forward(layer: transformer.FeedForward) -> bool:
    return len(layer.net) == 3 and isinstance(layer.net[0], GEGLU) and _biased(layer.net[0].proj, layer.net[2])


def _plain_resnet(block: ResnetBlock2D) -> bool:
    usual = block.time_embedding_norm == "default" and block.time_emb_proj is not None and not block.skip_time_act
    same = block.upsample is None and block.downsample is None and block.output_scale_factor == 1
    return usual and same and isinstance(block.nonlinearity, nn.SiLU) and _biased(block.norm1, block.norm2)


def _biased(*layers: Any) -> bool:
    return all(layer.bias is not None for layer in layers)


_LAYERS: tuple[tuple[type[nn.Module], type[nn.Module], Any], ...] = (
    (nn.Conv2d, Convolution, _plain_convolution),
    (nn.GroupNorm, GroupNorm, _biased),
    (transformer.FeedForward, FeedForward, _plain_feed_forward),
    (ResnetBlock2D, Resnet, _plain_resnet),
    (Transformer2DModel, Transformer, lambda model: model.is_input_continuous),
)
