"""The two halves of an encoder-decoder captioner as modules that torch.export can trace, and what they exchange.

What the encoder hands over is not its hidden states but what every step would make of them anew: the keys and values
of the decoder's cross-attention. No runtime looks inside. B images, R rows (a multiple of B: the beams of an image
follow each other), T tokens, P tokens before them, L layers, H heads of width D, S positions of the encoder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.models.trocr.modeling_trocr import TrOCRAttention
from transformers.pytorch_utils import Conv1D

from dbcap.models.libraries import quiet_libraries

NAME = "dbcap-export"
"""Of our attention among those of transformers."""
TANH_GELUS = ("NewGELUActivation", "GELUTanh")
"""Activations of transformers that are `gelu` with `approximate="tanh"`, spelt out or not."""


class Encoder(nn.Module):
    """pixels (B, 3, H, W) -> cross-attention keys and values: (B, 2 L, H, S D), by turns."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = model.encoder, model.decoder
        self.project = model.enc_to_dec_proj if hasattr(model, "enc_to_dec_proj") else nn.Identity()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images."""
        hidden = self.project(self.encoder(pixel_values=pixel_values).last_hidden_state)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        # Of this pass only the keys and values are asked for: the exporter leaves out all that they do not need.
        tokens = torch.zeros(hidden.shape[0], 1, dtype=torch.int64)
        mask = torch.zeros(1, 1, 1, 1)
        self.decoder(input_ids=tokens, encoder_hidden_states=hidden, attention_mask=mask, cache=cache, use_cache=True)
        pairs = []
        layers: Any = cache.cross_attention_cache.layers
        for layer in layers:
            pairs += [layer.keys.flatten(2), layer.values.flatten(2)]
        return torch.stack(pairs, 1)


class Decoder(nn.Module):
    """One decoder for any past: tokens (R, T), what `Encoder` gives, L pairs of keys and values (R, H, P, D).

    Returns logits (R, T, V) and the pairs with the new tokens, (R, H, P + T, D).
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(
        self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Decode tokens."""
        size = past[0].shape[3]
        heads = past[0].shape[1]
        places = encoder_hidden_states.shape[3] // size
        cross = []
        for number in range(0, len(past), 2):
            keys, values = (encoder_hidden_states.select(1, number + which) for which in range(2))
            cross.append((keys.unflatten(2, (places, size)), values.unflatten(2, (places, size))))
        cache = EncoderDecoderCache(_cache(list(zip(past[::2], past[1::2], strict=True))), _cache(cross))
        cache.is_updated = dict.fromkeys(range(len(cross)), True)
        before, new = past[0].shape[2], input_ids.shape[1]
        order = torch.arange(before + new)
        mask = torch.where(order[None, :] <= order[before:, None], 0.0, torch.finfo(torch.float32).min)
        told = encoder_hidden_states.new_empty(1, 1, heads * size)  # that there is an encoder; its content is not used
        logits = self.decoder(
            input_ids=input_ids,
            encoder_hidden_states=told,
            attention_mask=mask[None, None],
            cache=cache,
            use_cache=True,
        ).logits
        layers: Any = cache.self_attention_cache.layers
        return logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values))


def _cache(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for keys, values in pairs:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


# ---- the operators that are translated by hand


@torch.library.custom_op("dbcap::cross_attention", mutates_args=())
def cross_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend: query (R, H, T, D), keys and values (B, H, S, D) -> (R, T, H, D).

    The tokens of all rows of an image attend together. Keys times queries, not queries times keys: kernels bring what
    stands on the right into an order of their own first, and the keys are by far the larger.
    """
    rows, heads, tokens, size = query.shape
    queries = query.transpose(1, 2).reshape(keys.shape[0], -1, heads, size)
    chances = ((keys @ queries.permute(0, 2, 3, 1)) * scale).transpose(2, 3).softmax(-1)
    return (chances @ values).transpose(1, 2).reshape(rows, tokens, heads, size)


@cross_attention.register_fake
def _(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:  # noqa: ARG001
    rows, heads, tokens, size = query.shape
    return query.new_empty(rows, tokens, heads, size)


@torch.library.custom_op("dbcap::scores", mutates_args=())
def scores(hidden: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Multiply by the output table: (R, T, C), (V, C) -> (R, T, V)."""
    return functional.linear(hidden, table)


@scores.register_fake
def _(hidden: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return hidden.new_empty(*hidden.shape[:2], table.shape[0])


def attend(
    module: nn.Module,  # noqa: ARG001 - transformers hands it over
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers asks its attention functions to: three of (R, H, S, D) -> (R, S, H, D), and no weights.

    Only self-attention has a mask here.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is None:
        return cross_attention(query, key, value, scale), None
    chances = ((query @ key.transpose(2, 3)) * scale + attention_mask).softmax(-1)
    return (chances @ value).transpose(1, 2), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


class Attention(nn.Module):
    """What TrOCR's attention does, by `attend`: its own asks transformers for no attention function."""

    def __init__(self, module: TrOCRAttention) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            module.q_proj,
            module.k_proj,
            module.v_proj,
            module.out_proj,
        )
        self.heads, self.scale, self.layer = module.num_heads, module.scaling, module.layer_idx

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        cache: Any = None,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend to the tokens so far, or to `key_value_states`, whose keys and values are made once."""
        query = self._by_head(self.q_proj(hidden_states))
        if key_value_states is not None and cache.is_updated.get(self.layer):
            layer = cache.cross_attention_cache.layers[self.layer]
            keys, values = layer.keys, layer.values
        else:
            given = hidden_states if key_value_states is None else key_value_states
            kept = cache.self_attention_cache if key_value_states is None else cache.cross_attention_cache
            keys, values = (self._by_head(project(given)) for project in (self.k_proj, self.v_proj))
            keys, values = kept.update(keys, values, self.layer)
        return self.out_proj(attend(self, query, keys, values, attention_mask, self.scale)[0].flatten(2)), None

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


# ---- plain layers


class Product(nn.Module):
    """x W + b with W (K, N): one form for the linear layers of all models, which becomes one MatMul and one Add."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, False), None if bias is None else nn.Parameter(bias, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        x = x @ self.weight
        return x if self.bias is None else x + self.bias


class Table(nn.Module):
    """The output layer, whose weight (V, C) is in most models that of the embeddings too."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        x = scores(x, self.weight)
        return x if self.bias is None else x + self.bias


def simplify(model: Any) -> None:
    """Bring a `VisionEncoderDecoderModel` into the form that is exported. It computes the same, and trains no more."""
    model.eval().requires_grad_(False)
    head = model.decoder.get_output_embeddings()
    _replace(model, head)
    with quiet_libraries():
        model.decoder.set_attn_implementation(NAME)
    model.encoder.set_attn_implementation("eager")  # what becomes of torch's fused attention has needless checks


def _replace(module: Any, head: nn.Module) -> None:
    child: Any
    for name, child in module.named_children():
        if child is head:
            setattr(module, name, Table(head))
        elif type(child) is nn.Linear:
            setattr(module, name, Product(child.weight.T.contiguous(), child.bias))
        elif type(child) is Conv1D:
            setattr(module, name, Product(child.weight, child.bias))
        elif type(child).__name__ in TANH_GELUS:
            setattr(module, name, nn.GELU(approximate="tanh"))
        elif type(child) is TrOCRAttention:
            setattr(module, name, Attention(child))
            _replace(getattr(module, name), head)
        else:
            _replace(child, head)


@contextlib.contextmanager
def quiet_tracing() -> Iterator[None]:
    """Keep torch's exporter from talking."""
    import logging
    import warnings

    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
