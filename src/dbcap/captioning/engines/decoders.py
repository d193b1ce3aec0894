"""GPT-2 and BERT decoders with cross-attention, taken from their transformers modules into one plain form.

A layer of either is self-attention, cross-attention and two linear layers, each added to what it was given. GPT-2
normalises before each of them (as arXiv:2002.04745 draws it), BERT after the addition (arXiv:1706.03762).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dbcap.models.packed import Linear


@dataclass(frozen=True)
class Layer:
    """One layer. C is the width; a cross-attention's keys and values come from the encoder."""

    self_in: Linear  # C -> 3 C: queries, keys, values
    self_out: Linear
    self_norm: nn.LayerNorm
    cross_query: Linear
    cross_pair: Linear  # C -> 2 C: keys, values
    cross_out: Linear
    cross_norm: nn.LayerNorm
    widen: Linear  # with the activation
    narrow: Linear
    last_norm: nn.LayerNorm
    scale: float
    """Of the attention scores."""


@dataclass(frozen=True)
class Decoder:
    """A decoder. R rows, C its width, V the vocabulary."""

    layers: tuple[Layer, ...]
    heads: int
    width: int
    vocabulary: int
    normalise_first: bool
    embed: Callable[[torch.Tensor, int], torch.Tensor]
    """(tokens (R,), position) -> (R, C)."""
    logits: Callable[[torch.Tensor], torch.Tensor]
    """(R, C) -> (R, V)."""


def build(module: Any, release: Callable[[], None]) -> Decoder:
    """Take a decoder out of its transformers module, whose weights go as they are packed.

    The output layer, the largest, comes first: `release`, called after each layer, gives back what was read of a file,
    and so the table of embeddings, which is the same tensor in most models, takes memory only where it is looked up.
    """
    return BUILDERS[module.config.model_type](module, release)


def _gpt2(module: Any, release: Callable[[], None]) -> Decoder:
    config, body = module.config, module.transformer
    words, positions = body.wte.weight.detach(), body.wpe.weight.detach()
    head = Linear(module.lm_head.weight, module.lm_head.bias)
    release()
    layers = []
    for number, block in enumerate(body.h):
        scale = float(block.attn.scaling)
        layers.append(
            Layer(
                _conv1d(block.attn, "c_attn"),
                _conv1d(block.attn, "c_proj"),
                block.ln_1,
                _conv1d(block.crossattention, "q_attn"),
                _conv1d(block.crossattention, "c_attn"),
                _conv1d(block.crossattention, "c_proj"),
                block.ln_cross_attn,
                _conv1d(block.mlp, "c_fc", config.activation_function),
                _conv1d(block.mlp, "c_proj"),
                block.ln_2,
                scale,
            )
        )
        body.h[number] = nn.Identity()
        release()
    return Decoder(
        tuple(layers),
        config.n_head,
        config.n_embd,
        config.vocab_size,
        True,
        lambda tokens, position: functional.embedding(tokens, words) + positions[position],
        lambda hidden: head(body.ln_f(hidden)),
    )


def _conv1d(module: Any, name: str, activation: str = "") -> Linear:
    """Take GPT-2's linear layer, whose weight is stored the other way round, out of a module."""
    layer = getattr(module, name)
    setattr(module, name, None)
    return Linear(layer.weight.T, layer.bias, activation)


def _bert(module: Any, release: Callable[[], None]) -> Decoder:
    config, body, head = module.config, module.bert, module.cls.predictions
    embeddings = body.embeddings
    words = embeddings.word_embeddings.weight.detach()
    types = embeddings.token_type_embeddings.weight.detach()[0]
    positions = embeddings.position_embeddings.weight.detach()
    widen_head = Linear(head.transform.dense.weight, head.transform.dense.bias, config.hidden_act)
    vocabulary = Linear(head.decoder.weight, head.decoder.bias)
    release()
    layers = []
    for number, block in enumerate(body.encoder.layer):
        own, cross = block.attention, block.crossattention
        layers.append(
            Layer(
                _stacked(own.self.query, own.self.key, own.self.value),
                _stacked(own.output.dense),
                own.output.LayerNorm,
                _stacked(cross.self.query),
                _stacked(cross.self.key, cross.self.value),
                _stacked(cross.output.dense),
                cross.output.LayerNorm,
                Linear(block.intermediate.dense.weight, block.intermediate.dense.bias, config.hidden_act),
                _stacked(block.output.dense),
                block.output.LayerNorm,
                float(own.self.scaling),
            )
        )
        body.encoder.layer[number] = nn.Identity()
        release()
    return Decoder(
        tuple(layers),
        config.num_attention_heads,
        config.hidden_size,
        config.vocab_size,
        False,
        lambda tokens, position: embeddings.LayerNorm(
            functional.embedding(tokens, words) + types + positions[position]
        ),
        lambda hidden: vocabulary(head.transform.LayerNorm(widen_head(hidden))),
    )


def _stacked(*layers: nn.Linear) -> Linear:
    """Return one layer whose output is those of several, one after the other."""
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    return Linear(torch.cat([layer.weight.detach() for layer in layers]), torch.cat(biases) if biases else None)


BUILDERS: dict[str, Callable[[Any, Callable[[], None]], Decoder]] = {"gpt2": _gpt2, "bert": _bert}
"""`model_type` of a decoder -> what takes it out of its module."""
