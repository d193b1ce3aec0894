"""A diffusion model as one file or as diffusers' folder; what a run trained becomes part of it, LoRA and words too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dbcap.exporting.written import Written
from dbcap.models import families, folders
from dbcap.models.layout import CONFIG, read_object

if TYPE_CHECKING:
    from dbcap.models.families.sd import StableDiffusion
    from dbcap.models.hub import LocalModel


def opened(local: LocalModel) -> StableDiffusion:
    """Return a model with what belongs to it, none of its parts loaded."""
    family = families.load(local, "cpu", "float32")
    for one in local.additions:
        family.add(one)
    return family


def write_file(local: LocalModel, path: Path, half: bool, header: Mapping[str, str]) -> None:
    """Write one file with original names, in float16 if `half`. Raises as `StableDiffusion.write_single_file`."""
    opened(local).write_single_file(path, half, header)


def write_folder(local: LocalModel, folder: Path) -> list[Written]:
    """Fill a folder in diffusers' layout. Raises UsageError for a LoRA or embedding that does not fit."""
    family = opened(local)
    weights = {part: family.plain(part, torch.float32).state_dict() for part in family.added_to}
    folders.write(local, family.config, weights, folder, family.identity_with([]))
    if any(one.embedding for one in local.additions):
        for tokenizer, (name, encoder, _) in zip(family.tokenizers, family.text_parts, strict=True):
            tokenizer.save_pretrained(folder / name)
            path = folder / encoder / CONFIG
            folders.write_json(path, read_object(path) | {"vocab_size": len(tokenizer)})
    return [Written(path.relative_to(folder).as_posix(), "") for path in sorted(folder.glob("*/*.safetensors"))]
