"""Weights of safetensors files, read so that the file never stands in memory beside what was made of it.

A mapped file's pages count as memory of the process from their first use on. `release` gives them back: what is still
needed is read again from the system's cache. The format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import mmap
import os
import weakref
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dbcap.errors import ModelError

WINDOW = 64 * 2**20
"""Bytes that are read before their pages are given back."""
SMALL = 2**20
"""Bytes up to which a tensor is copied: a look at a mapped one can bring up to 2 MiB of its neighbours into memory."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class MappedWeights:
    """The tensors of one or more safetensors files. Raises what `safe_open` raises for a damaged one."""

    _start = ""
    """What the names begin with of those that count."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._maps: list[mmap.mmap] = []
        self._stamps: dict[int, tuple[Path, tuple[int, ...]]] = {}
        for file in files:
            with safe_open(file, "pt"):  # it checks the header, and that the file is as long as that says
                pass
            descriptor = os.open(file, os.O_RDONLY)
            weakref.finalize(self, os.close, descriptor)
            self._maps.append(mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY))
            self._stamps[descriptor] = file, _stamp(descriptor)

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """The number format of the largest tensor."""
        views = (view for mapped in self._maps for name, view in _views(mapped) if name.startswith(self._start))
        return max(views, key=lambda view: view.numel()).dtype

    @property
    def names(self) -> list[str]:
        """The names of all tensors, in the order of the files."""
        return [name for mapped in self._maps for name, _ in _views(mapped)]

    def check(self) -> None:
        """Raise ModelError where a file was written to since it was opened, as `cp` does, but not renaming over it.

        What is still mapped of it would be other weights, or lie behind its end, which kills the process.
        """
        for descriptor, (file, stamp) in self._stamps.items():
            if _stamp(descriptor) != stamp:
                raise ModelError(f"{file} was changed while it was in use", "load the model again")

    def stored(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Return the tensors of these names in the number formats that they have, not to be written to."""
        return {name: view for mapped in self._maps for name, view in _views(mapped) if name in names}

    def tensors(self, dtype: torch.dtype, start: str = "") -> dict[str, torch.Tensor]:
        """Return all tensors whose names have this start by name; those of floating-point numbers as `dtype`.

        Large ones are views of the file where it has them so, and not to be written to; others are copies.
        """
        found = {}
        read = views = 0
        for mapped in self._maps:
            for name, view in _views(mapped):
                if not name.startswith(start):
                    continue
                wanted = dtype if view.is_floating_point() else view.dtype
                copy = wanted != view.dtype or view.nbytes <= SMALL
                found[name] = view.to(wanted, copy=True) if copy else view
                views += not copy
                read += copy * view.nbytes
                if read >= WINDOW:
                    self.release()
                    read = 0
        self.release()
        if not views:  # whatever becomes of the files is nobody's business any more
            self._maps, self._stamps = [], {}
        return found

    def release(self) -> None:
        """Give the memory back, where the system can: pages that were read so far, and blocks that were freed."""
        for mapped in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)
        trim()


def _stamp(descriptor: int) -> tuple[int, ...]:
    state = os.fstat(descriptor)
    return state.st_size, state.st_mtime_ns


def trim() -> None:
    """Give freed blocks back, where the C library can: packing ViT-B and GPT-2 left 60 MiB in such holes."""
    if give := _malloc_trim():
        give(0)


@functools.cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # another C library, another system
        return None


def _views(mapped: mmap.mmap) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and tensors in the order of the file."""
    start = 8 + int.from_bytes(mapped[:8], "little")
    entries = {name: entry for name, entry in json.loads(mapped[8:start]).items() if name != "__metadata__"}
    for name, entry in sorted(entries.items(), key=lambda pair: pair[1]["data_offsets"]):
        dtype, shape = _DTYPES.get(entry["dtype"]), entry["shape"]
        if dtype is None:
            raise ValueError(f"{name} is stored as {entry['dtype']}, which torch has not")
        place, count = start + entry["data_offsets"][0], math.prod(shape)
        if not count:
            yield name, torch.empty(shape, dtype=dtype)
        elif place % dtype.itemsize:  # files of 2022 may lie so; kernels want whole steps
            whole = bytearray(mapped[place : place + count * dtype.itemsize])
            yield name, torch.frombuffer(whole, dtype=dtype).view(shape)
        else:
            yield name, torch.frombuffer(mapped, dtype=dtype, count=count, offset=place).view(shape)
