"""LoRA files (arXiv:2106.09685) of diffusers, peft and kohya, merged into the weights.

A layer becomes W + scale * alpha / rank * up down, with its own rank, and alpha = rank where the file names none.

A file names modules either by their paths (`unet.down_blocks.0...to_q.lora_A.weight`) or with underscores for all dots
(`lora_unet_down_blocks_0_..._to_q.lora_down.weight`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dbcap.errors import UsageError

_PARTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}
"""How the name of a module begins -> part of the pipeline."""
_DOWN = (".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight")
_UP = (".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight")
_LAYERS = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
_PROCESSOR = re.compile(r"(.*)\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight")


@dataclass
class _Pair:
    down: torch.Tensor | None = None  # (rank, in, ...)
    up: torch.Tensor | None = None  # (out, rank, ...)
    alpha: float | None = None


@dataclass
class Lora:
    """One file. `parts` holds what is not merged yet: part of the pipeline -> module, with underscores -> its pair."""

    path: Path
    scale: float
    parts: dict[str, dict[str, _Pair]] = field(default_factory=dict)

    def merge(self, part: str, module: nn.Module) -> None:
        """Add to the weights of a part. Raises UsageError for a module that it has not, or of another shape."""
        layers = {
            _flat(name).removeprefix("text_model_"): layer
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
        }
        for name, pair in self.parts.get(part, {}).items():
            layer = layers.get(name)
            if layer is None:
                raise UsageError(f"{self.path}: the {part} of this model has no {name}", "it is for another model")
            self._add(name, layer, pair)

    def _add(self, name: str, layer: nn.Linear | nn.Conv2d, pair: _Pair) -> None:
        assert pair.down is not None
        assert pair.up is not None
        down, up, shape = pair.down.float(), pair.up.float(), tuple(layer.weight.shape)
        rank = len(down)
        if up.shape[1] != rank or len(up) * down.numel() != rank * layer.weight.numel():
            about = f"{self.path}: {name} is {tuple(up.shape)} x {tuple(down.shape)}, and that layer {shape}"
            raise UsageError(about, "it is for another model")
        added = (up.flatten(1) @ down.flatten(1)).view(shape).to(layer.weight.device)
        factor = self.scale * (rank if pair.alpha is None else pair.alpha) / rank
        # A tensor of its own: the layer's may be a view of the model's file.
        merged = (layer.weight.float() + factor * added).to(layer.weight.dtype)
        layer.weight = nn.Parameter(merged.contiguous(memory_format=_format(layer.weight)), requires_grad=False)


def read(path: Path, scale: float, has: Mapping[str, bool]) -> Lora:
    """Read a file; `has` tells which parts the model has. Raises UsageError for a key that fits nothing."""
    lora = Lora(path, scale)
    try:
        with safe_open(path, "pt") as file:
            alphas = _alphas_in(file.metadata() or {})
            for key in file.keys():  # noqa: SIM118 - it is no dict
                part, name, kind = _place(key, path)
                if not has.get(part):
                    raise UsageError(f"{path}: {key} is for a {part}, which this model has not", "use another model")
                pair = lora.parts.setdefault(part, {}).setdefault(name, _Pair())
                if kind == "alpha":
                    pair.alpha = float(file.get_tensor(key))
                else:
                    setattr(pair, kind, file.get_tensor(key))
    except (OSError, SafetensorError) as error:
        raise UsageError(f"--lora {path} cannot be read: {error}", "it must be a .safetensors file") from error
    for part, pairs in lora.parts.items():
        for name, pair in pairs.items():
            if pair.down is None or pair.up is None:
                raise UsageError(f"{path}: {name} has one half only", "the file is damaged, or of another kind")
            pair.alpha = alphas.get((part, name), alphas.get((part, ""), None)) if pair.alpha is None else pair.alpha
    if not lora.parts:
        raise UsageError(f"{path} holds no LoRA", "choose another file")
    return lora


def _place(key: str, path: Path) -> tuple[str, str, str]:
    """Return the part, the module (with underscores) and what of the pair a key is."""
    name, kind = _split(key, path)
    start = next((start for start in _PARTS if name.startswith(start)), None)
    if start is None:
        raise UsageError(f"{path}: there is no place for {key}", "it is for a model of another kind")
    module = _flat(name[len(start) :]).removeprefix("text_model_")
    return _PARTS[start], module, kind


def _split(key: str, path: Path) -> tuple[str, str]:
    if match := _PROCESSOR.fullmatch(key):
        layer = "to_out.0" if match[2] == "to_out" else match[2]
        return f"{match[1]}.{layer}", match[3]
    for kind, endings in (("down", (*_DOWN, _LAYERS[0])), ("up", (*_UP, _LAYERS[1])), ("alpha", (".alpha",))):
        for ending in endings:
            if key.endswith(ending):
                return key[: -len(ending)], kind
    raise UsageError(f"{path}: dbcap does not know what {key} is", "it reads LoRA with one pair of matrices a layer")


def _alphas_in(metadata: Mapping[str, str]) -> dict[tuple[str, str], float]:
    """Return the alphas that diffusers writes into the header: of a part (module ""), and of single modules."""
    try:
        config: dict[str, Any] = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        return {}
    found: dict[tuple[str, str], float] = {}
    for key, value in config.items():
        part, _, name = key.partition(".")
        if name == "lora_alpha":
            found[part, ""] = float(value)
        elif name == "alpha_pattern":
            found |= {(part, _flat(module).removeprefix("text_model_")): float(one) for module, one in value.items()}
    return found


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _format(weight: torch.Tensor) -> torch.memory_format:
    channels_last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
