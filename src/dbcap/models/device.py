"""Where a model runs and in which number format: chosen from what the machine is, never from a timing or free memory.

docs/benchmarks.md has what was measured: dbcap's engine by model, batch size and number format, on CPUs with
AVX512-BF16. There the starter captioner (8.6 M parameters) is as accurate in bfloat16 as in float32 (500 composites:
99.2 % right greedily and 99.2 % with 4 beams, against 99.2 % and 99.0 %). In float16 that CPU takes 83 ms an image with
it, 8 at a time. With AMX only one model of 239 M was measured (`generate`: 2384 against 842 ms); on Arm and on GPUs
nothing.
"""

from __future__ import annotations

import functools
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from dbcap.errors import UsageError, did_you_mean
from dbcap.models import cpu

Dtype = Literal["float32", "bfloat16", "float16"]

# CPU classes whose matrix products are faster in bfloat16 than in float32.
BFLOAT16_CLASSES = frozenset({"amx", "avx512-bf16", "neon-bf16"})
# From this many parameters on bfloat16 was at least 1.4 times as fast on a CPU; 2 M gained 1.1 in large batches.
CPU_LOW_PRECISION_FROM = 8_000_000
# On a GPU small models wait for kernels to start, whatever the format. An estimate: nothing was measured.
GPU_LOW_PRECISION_FROM = 30_000_000
BFLOAT16_CAPABILITY = (8, 0)
FLOAT16_CAPABILITY = (7, 0)

BATCH_SIZES = Path(__file__).with_name("batch_sizes.json")
"""Written by `make bench`: CPU class -> dtype -> pairs of parameters and the batch size that was best for them."""
# Kind of device -> (up to how many parameters, batch size), the first line that fits. Estimates: nothing was measured.
GPU_BATCH_SIZES: dict[str, tuple[tuple[float, int], ...]] = {
    "cuda": ((120e6, 64), (math.inf, 32)),
    "mps": ((120e6, 32), (math.inf, 16)),
}


@dataclass(frozen=True)
class Accelerator:
    """A GPU that torch can use. `bfloat16`: it has arithmetic of its own for it."""

    device: str
    name: str
    memory_bytes: int | None
    bfloat16: bool
    capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class Choice:
    """What was chosen. `why` holds one short reason each for device, dtype, batch size and threads, in that order."""

    device: str
    dtype: Dtype
    batch_size: int
    threads: int
    why: tuple[str, ...]
    cpu_class: str


def choose(
    *,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: str | int = "auto",
    parameters: int,
    threads: int | None = None,
) -> Choice:
    """Choose for a model of this many parameters on this machine. `threads=None`: torch's, no more than usable cores.

    Changes nothing: the caller passes `threads` to torch. Raises UsageError for what this machine or torch has not.
    """
    if threads is None:
        import torch

        usable = cpu.cores()
        threads = min(torch.get_num_threads(), usable)
        reason = "all usable cores" if threads == usable else f"torch's own setting, of {usable} usable cores"
    else:
        reason = "asked for"
    return decide(
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        parameters=parameters,
        threads=threads,
        threads_reason=reason,
        cpu_class=cpu.cpu_class(),
        found=() if device == "cpu" else accelerators(),
        system=platform.system(),
    )


def accelerators() -> tuple[Accelerator, ...]:
    """Return the GPUs that torch can use here, in torch's order."""
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        capability = (about.major, about.minor)
        native = capability >= BFLOAT16_CAPABILITY
        found.append(Accelerator(f"cuda:{index}", about.name, about.total_memory, native, capability))
    if torch.backends.mps.is_available():
        native = torch.backends.mps.is_macos_or_newer(14, 0)
        found.append(Accelerator("mps", cpu.cpu_name(), torch.mps.recommended_max_memory(), native))
    return tuple(found)


def decide(
    *,
    device: str,
    dtype: str,
    batch_size: str | int,
    parameters: int,
    threads: int,
    threads_reason: str,
    cpu_class: str,
    found: Sequence[Accelerator],
    system: str,
) -> Choice:
    """Do what `choose` does for a machine with this CPU class, these GPUs and this system (`platform.system()`)."""
    if threads < 1:
        raise UsageError(f"{threads} threads are too few", "give 1 or more")
    place, gpu, why_device = _device(device, found)
    if gpu is None:
        number, why_dtype = _cpu_dtype(dtype, parameters, cpu_class, system)
    else:
        number, why_dtype = _gpu_dtype(dtype, parameters, gpu)
    kind = place.partition(":")[0]
    size, why_size = _batch_size(batch_size, parameters, kind, number, cpu_class)
    why = (
        f"device {place}: {why_device}",
        f"dtype {number}: {why_dtype}",
        f"batch size {size}: {why_size}",
        f"threads {threads}: {threads_reason}",
    )
    return Choice(place, number, size, threads, why, cpu_class)


def _device(asked: str, found: Sequence[Accelerator]) -> tuple[str, Accelerator | None, str]:
    """Return the device's name, its GPU (None: the CPU) and the reason."""
    by_name = {one.device: one for one in found}
    if asked == "auto":
        if not found:
            return "cpu", None, "torch finds no CUDA or MPS device"
        name = "cuda:0" if "cuda:0" in by_name else "mps"
        return name, by_name[name], by_name[name].name
    if asked == "cpu":
        return "cpu", None, "asked for"
    kind, colon, index = asked.partition(":")
    well_formed = (kind == "cuda" and (index.isdecimal() if colon else True)) or asked == "mps"
    if not well_formed:
        nearest = did_you_mean(asked, ["auto", "cpu", "cuda", "mps"])
        hint = f"use auto, cpu, cuda, cuda:N or mps{nearest and ': ' + nearest}"
        raise UsageError(f"there is no device {asked!r}", hint)
    name = "mps" if kind == "mps" else f"cuda:{int(index or 0)}"
    if name not in by_name:
        there = ", ".join(f"{one.device} ({one.name})" for one in found)
        has = f"torch finds {there}" if there else f"torch finds no {kind.upper()} device on this machine"
        raise UsageError(f"device {asked} is not there: {has}", f"use {', '.join(['auto', 'cpu', *by_name])}")
    return name, by_name[name], f"asked for ({by_name[name].name})"


def _cpu_dtype(asked: str, parameters: int, cpu_class: str, system: str) -> tuple[Dtype, str]:
    # torch for macOS is built without the library that uses a CPU's bfloat16 instructions.
    native = cpu_class in BFLOAT16_CLASSES and system != "Darwin"
    if asked != "auto":
        number = _known(asked)
        if number == "float16":
            return number, "asked for, but torch has no fast float16 for CPUs: expect a tenth of the speed"
        if number == "bfloat16" and not native:
            return number, f"asked for, but slower than float32: the CPU has no instructions for it ({cpu_class})"
        return number, "asked for"
    if not native:
        return "float32", f"no bfloat16 instructions that torch uses (CPU class {cpu_class})"
    if parameters < CPU_LOW_PRECISION_FROM:
        return "float32", f"{_small(parameters, CPU_LOW_PRECISION_FROM)} to gain from the CPU's bfloat16 ({cpu_class})"
    return "bfloat16", f"the CPU has it ({cpu_class}), and {_millions(parameters)} parameters are enough to gain"


def _gpu_dtype(asked: str, parameters: int, gpu: Accelerator) -> tuple[Dtype, str]:
    if asked != "auto":
        number = _known(asked)
        if number == "bfloat16" and not gpu.bfloat16:
            if gpu.capability is None:
                raise UsageError(f"{gpu.device} has no bfloat16 before macOS 14", "use float32 or float16")
            return number, f"asked for, but this GPU only imitates it ({_capability(gpu)})"
        return number, "asked for"
    if gpu.capability is None:
        # Nothing was measured on Apple's GPUs, and float32 is never wrong.
        return "float32", f"the safe format on {gpu.device}"
    if gpu.capability < FLOAT16_CAPABILITY:
        return "float32", f"this GPU gains nothing from less ({_capability(gpu)})"
    if parameters < GPU_LOW_PRECISION_FROM:
        return "float32", f"{_small(parameters, GPU_LOW_PRECISION_FROM)} to gain from less"
    if gpu.bfloat16:
        return "bfloat16", f"the GPU has it ({_capability(gpu)})"
    return "float16", f"the GPU has it, and no bfloat16 ({_capability(gpu)})"


def _batch_size(asked: str | int, parameters: int, kind: str, dtype: str, cpu_class: str) -> tuple[int, str]:
    if asked != "auto":
        if not isinstance(asked, int) or asked < 1:
            raise UsageError(f"{asked!r} is no batch size", "give auto, or a number from 1")
        return asked, "asked for"
    if kind != "cpu":
        size = next(size for most, size in GPU_BATCH_SIZES[kind] if parameters <= most)
        return size, f"for {_millions(parameters)} parameters on {kind}"
    tables = _batch_sizes()
    measured = cpu_class if cpu_class in tables else next(iter(tables))
    rows = tables[measured].get(dtype) or tables[measured]["float32"]
    nearest, size = min(rows, key=lambda row: abs(math.log(row[0] / max(parameters, 1))))
    return size, f"the best for {_millions(nearest)} parameters in `make bench` (CPU class {measured})"


@functools.cache
def _batch_sizes() -> dict[str, Any]:
    tables: dict[str, Any] = json.loads(BATCH_SIZES.read_text("utf-8"))
    return tables


def _known(dtype: str) -> Dtype:
    if dtype not in get_args(Dtype):
        known = ("auto", *get_args(Dtype))
        nearest = did_you_mean(dtype, known)
        raise UsageError(f"there is no dtype {dtype!r}", f"use {', '.join(known)}{nearest and ': ' + nearest}")
    return cast(Dtype, dtype)


def _small(parameters: int, enough: int) -> str:
    return f"{_millions(parameters)} parameters are too few (under {_millions(enough)})"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.3g} M"


def _capability(gpu: Accelerator) -> str:
    return "compute capability {}.{}".format(*gpu.capability) if gpu.capability else gpu.device
