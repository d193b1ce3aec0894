"""All randomness of a step is a function of (seed, step, sample): nothing is carried from one step to the next.

So a run that goes on from a checkpoint draws what an uninterrupted one draws, with any number of workers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator

import torch

from dbcap.generation import sampling


def seed_of(*parts: int | str) -> int:
    """Return 64 bits that these numbers and words stand for."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def generator(*parts: int | str) -> torch.Generator:
    """Return a source of randomness on the CPU that these numbers and words stand for."""
    return sampling.generator(seed_of(*parts))


@functools.lru_cache(maxsize=64)
def _order(seed: int, stream: str, epoch: int, count: int) -> tuple[int, ...]:
    return tuple(torch.randperm(count, generator=generator(seed, "order", stream, epoch)).tolist())


def place(seed: int, stream: str, sample: int, count: int) -> int:
    """Return which of `count` things sample number `sample` of a run is: each once an epoch, in a new order."""
    return _order(seed, stream, sample // count, count)[sample % count]


@contextlib.contextmanager
def library_draws(*parts: int | str) -> Iterator[None]:
    """Have libraries that draw from torch's global generators (dropout) draw what these parts stand for."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed_of(*parts) & (2**63 - 1))
        yield
