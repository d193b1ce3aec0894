"""The torch engine: transformers' encoder with packed layers, and a decoder step that repeats and copies nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from dbcap.captioning.engines import attention, decoders
from dbcap.captioning.engines.decoders import Layer
from dbcap.captioning.rules import Best, Ids
from dbcap.models import packed
from dbcap.models.libraries import compile_module
from dbcap.models.mapped import trim

ROOM = 32
"""Positions that a cache has room for at first; it doubles when they are used up."""
BLOCK = 8
"""Positions whose rows change places at once."""


@dataclass
class Cache:
    """Keys and values. T positions, L layers, R rows of B images, H heads of width D, S positions of the encoder."""

    own: torch.Tensor
    """(T, L, 2, R, H D): of the tokens so far."""
    cross: torch.Tensor
    """(L, 2, B, H, S, D): of the image, shared by all its rows."""
    most: int
    """Positions that will be asked for at most."""
    used: int = 0


class TorchEngine:
    """Runs a VisionEncoderDecoderModel whose modules it takes over: the model is of no use afterwards."""

    def __init__(self, model: Any, release: Callable[[], None] = lambda: None) -> None:
        """Take the weights out of a model; `release` gives back the memory of those that were read from a file."""
        self._device, self._dtype = model.device, model.dtype
        self._encoder = model.encoder
        self._project = model.enc_to_dec_proj if hasattr(model, "enc_to_dec_proj") else None
        self._decoder = decoders.build(model.decoder, release)
        packed.pack_linears(self._encoder, release)
        if self._device.type == "cpu" and self._dtype == torch.bfloat16:
            self._encoder.set_attn_implementation(attention.NAME)

    @property
    def leaves(self) -> bool:
        """Whether finished images leave the batch: in float32."""
        return self._dtype == torch.float32

    def compile(self) -> str:
        """Have the encoder compiled at its first use. Returns an empty string, or why that is not done."""
        if packed.can_pack(next(self._encoder.parameters())):
            # ViT-B, 8 images, 2 cores with AVX512-BF16: 332 ms packed, 385 to 418 ms compiled; float32 644, 1280 ms.
            return "on this CPU the engine's packed layers are faster than what torch.compile makes"
        compile_module(self._encoder)
        return ""

    @torch.inference_mode()
    def encode(self, pixels: npt.NDArray[np.float32], width: int, length: int) -> Cache:
        """Encode pixels (B, 3, H, W), and make the cache for B x `width` rows of up to `length` tokens."""
        images = torch.from_numpy(pixels).to(self._device, self._dtype)
        hidden = self._encoder(pixel_values=images).last_hidden_state
        if self.leaves:  # 30 MiB of 8 images, for 1 ms; in bfloat16 memory is not short, and 1 ms is more
            trim()
        if self._project is not None:
            hidden = self._project(hidden)
        decoder = self._decoder
        count, places, _ = hidden.shape
        layers, heads, size = len(decoder.layers), decoder.heads, decoder.width // decoder.heads
        cross = hidden.new_empty(layers, 2, count, heads, places, size)
        for pair, layer in zip(cross, decoder.layers, strict=True):
            pair.copy_(layer.cross_pair(hidden).view(count, places, 2, heads, size).permute(2, 0, 3, 1, 4))
        own = hidden.new_empty(min(ROOM, length), layers, 2, count * width, decoder.width)
        return Cache(own, cross, length)

    @torch.inference_mode()
    def step(self, tokens: Ids, cache: Cache, best: int, watched: Ids) -> Best:
        """Decode one token of each row (R,); see `search.Engine`."""
        if cache.used == len(cache.own):
            _grow(cache)
        hidden = self._decoder.embed(torch.from_numpy(tokens).to(self._device), cache.used)
        for number, layer in enumerate(self._decoder.layers):
            hidden = self._layer(hidden, layer, number, cache)
        cache.used += 1
        return _best(self._decoder.logits(hidden), best, torch.from_numpy(watched).to(self._device))

    @torch.inference_mode()
    def reorder(self, cache: Cache, rows: Ids) -> None:
        """Put old row `rows[i]` at row i; where there are fewer rows, whole images left."""
        old = cache.own.shape[3]
        if len(rows) == old:
            if (rows != np.arange(old)).any():
                _change_places(cache, torch.from_numpy(rows).to(self._device))
            return
        width = old // cache.cross.shape[2]
        images = torch.from_numpy(rows[::width] // width).to(self._device)
        cache.cross = cache.cross.index_select(2, images)
        cache.own = cache.own.index_select(3, torch.from_numpy(rows).to(self._device))

    def _layer(self, hidden: torch.Tensor, layer: Layer, number: int, cache: Cache) -> torch.Tensor:
        """(R, C) -> (R, C)."""
        first = self._decoder.normalise_first
        given = layer.self_norm(hidden) if first else hidden
        hidden = hidden + self._attend_self(given, layer, number, cache)
        hidden = hidden if first else layer.self_norm(hidden)

        given = layer.cross_norm(hidden) if first else hidden
        hidden = hidden + self._attend_cross(given, layer, cache.cross[number])
        hidden = hidden if first else layer.cross_norm(hidden)

        given = layer.last_norm(hidden) if first else hidden
        hidden = hidden + layer.narrow(layer.widen(given))
        return hidden if first else layer.last_norm(hidden)

    def _attend_self(self, hidden: torch.Tensor, layer: Layer, number: int, cache: Cache) -> torch.Tensor:
        rows, heads = len(hidden), self._decoder.heads
        query, pair = layer.self_in(hidden).split([self._decoder.width, 2 * self._decoder.width], dim=1)
        cache.own[cache.used, number] = pair.view(rows, 2, -1).transpose(0, 1)
        # In float32, whose kernel is four times as fast for one query a row as that for bfloat16.
        past = cache.own[: cache.used + 1, number].float()
        keys, values = past.view(-1, 2, rows, heads, past.shape[-1] // heads).permute(1, 2, 3, 0, 4)
        query = query.float().view(rows, heads, 1, -1)
        attended = functional.scaled_dot_product_attention(query, keys, values, scale=layer.scale)
        return layer.self_out(attended.view(rows, -1).to(hidden.dtype))

    def _attend_cross(self, hidden: torch.Tensor, layer: Layer, pair: torch.Tensor) -> torch.Tensor:
        """Let the rows of an image be the queries of one attention over its keys and values (2, B, H, S, D)."""
        _, images, heads, _, size = pair.shape
        keys, values = pair.flatten(1, 2)
        query = layer.cross_query(hidden).view(images, -1, heads, size).transpose(1, 2).flatten(0, 1)
        scores = torch.baddbmm(query.new_empty(()), query, keys.transpose(1, 2), beta=0, alpha=layer.scale)
        attended = torch.bmm(scores.softmax(-1), values).view(images, heads, -1, size)
        return layer.cross_out(attended.transpose(1, 2).reshape(len(hidden), -1))


def _best(logits: torch.Tensor, best: int, watched: torch.Tensor) -> Best:
    """Take the `best` (R, K) and the watched (R, W) out of logits (R, V)."""
    logprobs = functional.log_softmax(logits, -1, dtype=torch.float32)
    top, tokens = logprobs.topk(min(best, logits.shape[1]))
    asked = watched.clamp(min=0)
    parts = (tokens, logits.gather(1, tokens).float(), top, logits.gather(1, asked).float(), logprobs.gather(1, asked))
    return Best(*(part.cpu().numpy() for part in parts))


def _grow(cache: Cache) -> None:
    room = min(2 * len(cache.own), cache.most)
    own = cache.own.new_empty(room, *cache.own.shape[1:])
    own[: cache.used] = cache.own[: cache.used]
    cache.own = own


def _change_places(cache: Cache, rows: torch.Tensor) -> None:
    for start in range(0, cache.used, BLOCK):
        block = cache.own[start : min(start + BLOCK, cache.used)]
        block.copy_(block.index_select(3, rows))
