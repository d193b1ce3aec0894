"""LoRA files (arXiv:2106.09685) of diffusers, peft and kohya, merged into the weights.

A layer becomes W + scale * alpha / rank * up down, with its own rank, and alpha = rank where the file names none.

A file names modules either by their paths (`unet.down_blocks.0...to_q.lora_A.weight`) or with underscores for all dots
(`lora_unet_down_blocks_0_..._to_q.lora_down.weight`); kohya's files for SDXL name the denoiser's as original files do
(`lora_unet_input_blocks_1_1_..._to_q.lora_down.weight`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dbcap.errors import ModelError, UsageError

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
_OTHER_KINDS = {
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".lora_mid": "LoRA with a Tucker core",
    ".oft_": "OFT",
}
"""What a key has in it -> what is no plain LoRA."""
_TWICE = "the file must have each layer once"


@dataclass
class _Pair:
    module: str  # as the file names it
    down: torch.Tensor | None = None  # (rank, in, ...)
    up: torch.Tensor | None = None  # (out, rank, ...)
    alpha: torch.Tensor | float | None = None

    @property
    def rank(self) -> int:
        return self.up.shape[1] if self.up is not None and self.up.ndim > 1 else 0


@dataclass(frozen=True)
class _Config:
    """What peft's config of a part says of alpha."""

    alpha: float
    patterns: Mapping[re.Pattern[str], float]
    """Of the modules whose name, or the end of it, is such."""
    rooted: bool
    """Whether alpha is divided by the root of the rank (rsLoRA, arXiv:2312.03732)."""

    def alpha_of(self, pair: _Pair) -> float:
        """Return the alpha that, divided by the rank, makes the same."""
        fits = (alpha for pattern, alpha in self.patterns.items() if pattern.fullmatch(pair.module))
        return next(fits, self.alpha) * (math.sqrt(pair.rank) if self.rooted else 1)


@dataclass
class Lora:
    """One file. `parts` holds what is not merged yet: part of the pipeline -> module, with underscores -> its pair."""

    path: Path
    scale: float
    parts: dict[str, dict[str, _Pair]] = field(default_factory=dict)

    def merge(self, part: str, module: nn.Module, also: Mapping[str, str] = MappingProxyType({})) -> None:
        """Add to the weights of a part; `also` holds second names of its modules, by their paths.

        Raises UsageError for a module that it has not, or of another shape, ModelError for one that the file has twice.
        """
        layers = {
            flat(name): layer
            for path, layer in module.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
            for name in (path, also.get(path, path))
        }
        merged: dict[nn.Module, str] = {}
        for name, pair in self.parts.get(part, {}).items():
            layer = layers.get(name)
            if layer is None:
                raise UsageError(f"{self.path}: the {part} of this model has no {name}", "it is for another model")
            if layer in merged:
                raise ModelError(f"{self.path}: {merged[layer]} and {name} are one layer", _TWICE)
            merged[layer] = name
            self._add(name, layer, pair)

    def _add(self, name: str, layer: nn.Linear | nn.Conv2d, pair: _Pair) -> None:
        assert pair.down is not None
        assert pair.up is not None
        down, up, shape = pair.down.float(), pair.up.float(), tuple(layer.weight.shape)
        rank = pair.rank
        if not rank or _bare(up.shape) != (shape[0], rank) or _bare(down.shape) != _bare((rank, *shape[1:])):
            about = f"{self.path}: {name} is {tuple(up.shape)} x {tuple(down.shape)}, and that layer {shape}"
            raise UsageError(about, "it is for another model")
        added = (up.flatten(1) @ down.flatten(1)).view(shape).to(layer.weight.device)
        factor = self.scale * (rank if pair.alpha is None else float(pair.alpha)) / rank
        # A tensor of its own: the layer's may be a view of the model's file.
        merged = (layer.weight.float() + factor * added).to(layer.weight.dtype)
        if not _finite(merged):
            dtype = str(merged.dtype).removeprefix("torch.")
            raise UsageError(f"{self.path}: {name} becomes too large for {dtype}", "choose a smaller scale")
        layer.weight = nn.Parameter(merged.contiguous(memory_format=_format(layer.weight)), requires_grad=False)


def read(path: Path, scale: float, has: Mapping[str, bool]) -> Lora:
    """Read a file; `has` tells which parts the model has.

    Raises ModelError for a file that is damaged, UsageError for one of another kind and for a key that fits nothing.
    """
    lora = Lora(path, scale)
    try:
        with safe_open(path, "pt") as file:
            configs = _configs(file.metadata() or {}, path)
            for key in file.keys():  # noqa: SIM118 - it is no dict
                part, module, kind = _place(key, path)
                if not has.get(part):
                    raise UsageError(f"{path}: {key} is for a {part}, which this model has not", "use another model")
                pair = lora.parts.setdefault(part, {}).setdefault(flat(module), _Pair(module))
                if getattr(pair, kind) is not None:
                    raise ModelError(f"{path}: {key} is in it a second time, by another name", _TWICE)
                setattr(pair, kind, _sound(key, kind, file.get_tensor(key), path))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "it must be a whole .safetensors file") from error
    for part, pairs in lora.parts.items():
        for name, pair in pairs.items():
            if pair.down is None or pair.up is None:
                raise ModelError(f"{path}: {name} has one half only", "the file is damaged, or of another kind")
            if pair.alpha is None and part in configs:
                pair.alpha = configs[part].alpha_of(pair)
    if not lora.parts:
        raise UsageError(f"{path} holds no LoRA", "choose another file")
    return lora


def _place(key: str, path: Path) -> tuple[str, str, str]:
    """Return the part, the module as the key names it, and what of the pair a key is."""
    name, kind = _split(key, path)
    start = next((start for start in _PARTS if name.startswith(start)), None)
    if start is None:
        raise UsageError(f"{path}: there is no place for {key}", "it is for a model of another kind")
    return _PARTS[start], name[len(start) :], kind


def _split(key: str, path: Path) -> tuple[str, str]:
    if match := _PROCESSOR.fullmatch(key):
        layer = "to_out.0" if match[2] == "to_out" else match[2]
        return f"{match[1]}.{layer}", match[3]
    for kind, endings in (("down", (*_DOWN, _LAYERS[0])), ("up", (*_UP, _LAYERS[1])), ("alpha", (".alpha",))):
        for ending in endings:
            if key.endswith(ending):
                return key[: -len(ending)], kind
    hint = "dbcap reads plain LoRA: one pair of matrices a layer"
    if other := next((other for mark, other in _OTHER_KINDS.items() if mark in key), None):
        raise UsageError(f"{path} is {other}: it has {key}", hint)
    raise UsageError(f"{path}: dbcap does not know what {key} is", hint)


def _sound(key: str, kind: str, tensor: torch.Tensor, path: Path) -> torch.Tensor:
    if not _finite(tensor.float()):
        raise ModelError(f"{path}: {key} has numbers that are not finite", "its training failed; choose another file")
    if kind == "alpha" and tensor.numel() != 1:
        raise ModelError(f"{path}: {key} is {tuple(tensor.shape)}, and not one number", "choose another file")
    return tensor


def _configs(metadata: Mapping[str, str], path: Path) -> dict[str, _Config]:
    """Return the configs that diffusers writes into the header, by part."""
    found = {}
    try:
        said = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        for part in set(_PARTS.values()):
            if f"{part}.lora_alpha" in said:
                # How peft finds the modules that a pattern is for.
                patterns = {
                    re.compile(rf"(.*\.)?({pattern})"): float(alpha)
                    for pattern, alpha in (said.get(f"{part}.alpha_pattern") or {}).items()
                }
                rooted = bool(said.get(f"{part}.use_rslora"))
                found[part] = _Config(float(said[f"{part}.lora_alpha"]), patterns, rooted)
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise ModelError(f"{path}: its lora_adapter_metadata makes no sense: {error}", "choose another file") from error
    return found


def flat(name: str) -> str:
    """Return a module's path with underscores for dots, as kohya writes it, and without `text_model` in front."""
    return name.replace(".", "_").removeprefix("text_model_")


def _finite(tensor: torch.Tensor) -> bool:
    # Not by isfinite(), which takes as long as the merge; these two are not finite if one number is not.
    return tensor.numel() == 0 or all(math.isfinite(one) for one in tensor.aminmax())


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a matrix where it is that of a 1x1 convolution."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _format(weight: torch.Tensor) -> torch.memory_format:
    channels_last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
