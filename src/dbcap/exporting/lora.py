"""LoRA files from one way of naming to the other: kohya's, which A1111's web UI and ComfyUI read, or diffusers'.

kohya writes a module's path with underscores, behind `lora_unet_` and `lora_te_`, and an `alpha` beside each pair of
matrices; for XL behind `lora_te1_` and `lora_te2_`, and the denoiser's modules as original files name them. diffusers
writes paths as they are and, as peft, rank and alpha into the header. The matrices are the same to the bit.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open

from dbcap.errors import ModelError, UsageError
from dbcap.models import lora
from dbcap.models.families.original import unet_names
from dbcap.models.parts import published
from dbcap.models.tensors import save_file

_METADATA = "lora_adapter_metadata"
_TEXTS = ("text_encoder", "text_encoder_2")
_WORDS = (
    *("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "time_embedding", "add_embedding"),
    *("time_emb_proj", "conv_shortcut", "conv_in", "conv_out", "proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out"),
    *("class_embedding", "linear_1", "linear_2", "text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    *("text_projection",),
)
"""Names with underscores that modules of denoisers and text encoders have; all other underscores are dots."""
NAMES = {
    *_WORDS,
    *("attentions", "resnets", "downsamplers", "upsamplers", "attn1", "attn2", "ff", "net", "proj"),
    *("conv", "conv1", "conv2", "encoder", "layers", "mlp", "fc1", "fc2"),
    *("embeddings", "token_embedding", "position_embedding"),
}
"""All names that stand in paths of layers, but numbers."""
_SPELLING = re.compile("|".join(_WORDS))
_XL_STATES = 2048
"""Numbers that XL's denoiser is told of each token; those of Stable Diffusion 1 and 2 are told 768 or 1024."""
_XL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
}
"""Of which modules XL's denoiser consists; their sizes do not matter."""


@dataclass(frozen=True)
class Module:
    """One pair of matrices."""

    part: str
    path: str
    """In the part, as diffusers and transformers name it in files."""
    down: torch.Tensor
    """(R, in, ...)"""
    up: torch.Tensor
    """(out, R, ...)"""
    alpha: float

    @property
    def rank(self) -> int:
        """R."""
        return self.up.shape[1]

    @property
    def end(self) -> str:
        """Its path without `text_model` in front."""
        return self.path.removeprefix("text_model.")


def convert(source: Path, target: Path, layout: str, unet: Mapping[str, Any] | None, header: Mapping[str, str]) -> int:
    """Write a LoRA file with the names of a layout, "kohya" or "diffusers"; returns how many modules it has.

    `unet` is the config of the model that it is for; without one that is Stable Diffusion 1, 2 or XL, by its shapes.
    What the file's header says is kept, and `header` added. Raises ModelError for a file that is damaged, UsageError
    for what is no plain LoRA and for a key without a place.
    """
    read = lora.read(source, 1.0, dict.fromkeys(("unet", *_TEXTS), True))
    xl = _is_xl(read, unet)
    original = _original(unet or _XL) if xl else {}
    modules = list(_modules(read, source, {lora.flat(name): path for path, name in original.items()}))
    with safe_open(source, "pt") as file:
        said = {name: text for name, text in (file.metadata() or {}).items() if name != _METADATA}
    said = {"format": "pt", **said, **header}
    if layout == "kohya":
        save_file(_kohya(modules, original, xl, source), target, said)
    else:
        save_file(_diffusers(modules), target, {**said, _METADATA: json.dumps(_peft(modules), sort_keys=True)})
    return len(modules)


def _is_xl(read: lora.Lora, unet: Mapping[str, Any] | None) -> bool:
    if unet is not None:
        return unet.get("addition_embed_type") == "text_time"
    if _TEXTS[1] in read.parts:
        return True
    pairs = read.parts.get("unet", {})
    told = (pair.down.shape[1] for name, pair in pairs.items() if name.endswith("attn2_to_k") and pair.down is not None)
    return next(told, 0) == _XL_STATES or any(name.startswith(("input_blocks", "output_blocks")) for name in pairs)


def _original(config: Mapping[str, Any]) -> dict[str, str]:
    """Return how original files name the modules of a denoiser, by their paths."""
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(dict(config))
        names = unet_names(model)
    return {path: names.get(path, "") for path, _ in model.named_modules() if names.get(path)}


def _modules(read: lora.Lora, source: Path, originals: Mapping[str, str]) -> Iterator[Module]:
    """Yield the modules of a file, by parts and paths; `originals` leads from original names to paths."""
    for part, pairs in sorted(read.parts.items()):
        for name, pair in sorted(pairs.items()):
            assert pair.down is not None
            assert pair.up is not None
            if not pair.rank or pair.down.shape[:1] != (pair.rank,):
                shapes = f"{tuple(pair.up.shape)} x {tuple(pair.down.shape)}"
                raise ModelError(f"{source}: {name} is {shapes}, which is no product", "the file is damaged")
            path = pair.module if "." in pair.module else originals.get(name) or spelled(name)
            if any(word not in NAMES and not word.isdigit() for word in path.split(".")):
                raise UsageError(f"{source}: no {part} has a place for {path}", "it is for a model of another kind")
            alpha = pair.rank if pair.alpha is None else pair.alpha
            yield Module(part, published(path), pair.down, pair.up, float(alpha))


def spelled(name: str) -> str:
    """Return the path of a module whose dots became underscores: `mid_block_resnets_0` is `mid_block.resnets.0`."""
    dotted = _SPELLING.sub(lambda match: match[0].replace("_", "\0"), name)
    return dotted.replace("_", ".").replace("\0", "_")


def _kohya(modules: list[Module], original: Mapping[str, str], xl: bool, source: Path) -> dict[str, torch.Tensor]:
    starts = {"unet": "lora_unet_", _TEXTS[0]: "lora_te1_" if xl else "lora_te_", _TEXTS[1]: "lora_te2_"}
    found: dict[str, torch.Tensor] = {}
    for one in modules:
        path = one.path
        if xl and one.part == "unet":
            if one.path not in original:
                raise UsageError(f"{source}: XL's denoiser has no {one.path}", "it is for another model")
            path = original[one.path]
        name = starts[one.part] + path.replace(".", "_")
        alpha = torch.tensor(one.alpha, dtype=one.up.dtype)
        # As kohya: in the number format of the matrices, unless it is too fine for that.
        found[f"{name}.alpha"] = alpha if float(alpha) == one.alpha else torch.tensor(one.alpha)
        found[f"{name}.lora_down.weight"], found[f"{name}.lora_up.weight"] = one.down, one.up
    return found


def _diffusers(modules: list[Module]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for one in modules:
        name = f"{one.part}.{one.path}"
        found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = one.down, one.up
    return found


def _peft(modules: list[Module]) -> dict[str, Any]:
    """Return peft's settings of each part: what most modules have, and what others have by their paths.

    peft looks for the ends of paths, and not all versions of transformers have `text_model` in front.
    """
    said: dict[str, Any] = {}
    for part in sorted({one.part for one in modules}):
        own = [one for one in modules if one.part == part]
        rank = Counter(one.rank for one in own).most_common(1)[0][0]
        alpha = Counter(one.alpha for one in own).most_common(1)[0][0]
        settings = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": [one.end for one in own],
            "rank_pattern": {one.end: one.rank for one in own if one.rank != rank},
            "alpha_pattern": {one.end: one.alpha for one in own if one.alpha != alpha},
        }
        said |= {f"{part}.{name}": value for name, value in settings.items()}
    return said
