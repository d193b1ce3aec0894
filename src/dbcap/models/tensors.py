"""Files of tensors, the same to the byte for the same content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import torch as safetensors

from dbcap.errors import ModelError

_METADATA = "__metadata__"


def save_file(tensors: Mapping[str, torch.Tensor], path: Path, header: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. Raises OSError or SafetensorError where it cannot be written."""
    ready: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    for name, one in tensors.items():
        ready[name] = one.detach().cpu().contiguous()
        place = ready[name].untyped_storage().data_ptr()
        if place in places:  # the library refuses to write memory twice
            ready[name] = ready[name].clone()
        places.add(place)
    path.touch()
    usual = path.stat().st_mode
    safetensors.save_file(ready, path, dict(header or {}) or None)
    path.chmod(usual)  # the library makes files for their owner only
    if not header or len(header) < 2:
        return
    with path.open("r+b") as file:  # the library writes what the header says in an order of chance
        size = int.from_bytes(file.read(8), "little")
        said = json.loads(file.read(size))
        said[_METADATA] = dict(sorted(said[_METADATA].items()))
        text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))


def halved(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return a tensor of floating-point numbers in float16, others as they are. Raises ModelError, naming it."""
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    if not torch.isfinite(half).all():
        raise ModelError(f"{name} has numbers too large for float16", "leave out --fp16")
    return half
