"""What a run will take, said before it begins: memory, disk and time. What cannot fit is refused."""

from __future__ import annotations

import itertools
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from dbcap.config.training import TrainConfig
from dbcap.errors import DbcapError, UsageError
from dbcap.events import Events
from dbcap.files import in_units
from dbcap.models import cpu
from dbcap.runs import Run
from dbcap.training.data import Data
from dbcap.training.module import DreamBooth

if TYPE_CHECKING:
    from dbcap.training.trainee import Trainee

STATES = {"adamw": 8.0, "adamw8bit": 2.06, "adafactor": 0.1}
"""Bytes that an optimizer remembers for a weight."""
ROOM = 1.05
"""Files of a checkpoint against the tensors in them, and what else is written meanwhile."""
CHECKPOINTED = 0.1
"""What checkpointing leaves of that: 0.75 of 7.9 GB at SD 1.5's size, two rows of 64x64 latents."""
_SIDE = 1024
"""Of the product that is timed."""


def check(module: DreamBooth, data: Data, config: TrainConfig, run: Run, step: int, events: Events) -> None:
    """Say what the rest of a run takes. Raises UsageError where memory, DbcapError where the disk will not last."""
    trained = sum(one.numel() for one in module.trainee.weights.masters.values())
    work = forward_pass(module.trainee, data, config.batch_size)
    memory = memory_bytes(module, config, trained) + work.memory
    there = cpu.memory_bytes()
    if module.device.type == "cuda":
        there = torch.cuda.get_device_properties(module.device).total_memory
    one = int(trained * (4 * (1 + config.ema) + STATES[config.optimizer]) * ROOM)
    disk = one * (config.keep + 2) + 4 * trained
    free = shutil.disk_usage(run.folder).free
    seconds = work.operations * config.accumulate / speed(module.trainee.family.dtype, module.device)
    left = (config.steps or 0) - step
    minutes = seconds * left / 60
    events.say(
        f"{run.name}: {trained / 1e6:.1f} M weights are trained; about {in_units(memory)} of memory,"
        f" {in_units(disk)} of disk at most, {_about(minutes)} for {left} steps"
    )
    if there is not None and memory > there:
        raise UsageError(
            f"training takes about {in_units(memory)} of memory, and there are {in_units(there)}",
            "--method lora, --optimizer adamw8bit or --batch-size 1 take less",
        )
    if one + 4 * trained > free:
        raise DbcapError(
            f"one checkpoint and the result take {in_units(one + 4 * trained)}, and {in_units(free)} of disk are free",
            f"make room{', or choose --method lora' * (config.method == 'full' and not step)}",
        )


def memory_bytes(module: DreamBooth, config: TrainConfig, trained: int) -> int:
    """Return what weights, gradients, optimizer and moving average take."""
    working = sum(one.nbytes for part in module.trainee.modules.values() for one in part.parameters())
    low = any(one.dtype != torch.float32 for one in module.trainee.weights.working.values())
    gradients = trained * (4 if not low or config.accumulate > 1 else 2)
    masters = 4 * trained if low else 0
    return int(working + masters + gradients + trained * (STATES[config.optimizer] + 4 * config.ema))


@dataclass(frozen=True)
class Work:
    """What the denoiser takes for a micro-batch."""

    operations: float
    """Floating-point operations of both passes: the backward one is twice the forward, recomputing once more."""
    memory: int
    """Bytes that the forward pass keeps for the backward."""


def forward_pass(trainee: Trainee, data: Data, batch_size: int) -> Work:
    """Run a forward pass on tensors that have shapes only, and count."""
    dtype, first = trainee.family.dtype, data.photos[0].views[0].mean
    rows = batch_size * (2 if data.classes else 1)
    held = itertools.chain(trainee.unet.named_parameters(), trainee.unet.named_buffers())
    shapes = {name: one.detach().to("meta").requires_grad_(one.requires_grad) for name, one in held}
    own = {one.untyped_storage()._cdata for one in shapes.values()}
    kept: dict[int, torch.Tensor] = {}

    def keep(one: torch.Tensor) -> torch.Tensor:
        if one.untyped_storage()._cdata not in own:
            kept[one.untyped_storage()._cdata] = one
        return one

    with torch.no_grad():
        told = trainee.tell(torch.zeros(rows, dtype=torch.int64))
    checkpoints = [part for part in trainee.unet.modules() if getattr(part, "gradient_checkpointing", False)]
    for part in checkpoints:  # what is kept inside of it is not seen from here
        part.gradient_checkpointing = False
    try:
        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
            functional_call(
                trainee.unet,
                shapes,
                (torch.empty(rows, *first.shape, dtype=dtype, device="meta"), torch.zeros(rows, device="meta")),
                {
                    "encoder_hidden_states": told.states.to("meta", dtype),
                    "added_cond_kwargs": {name: one.to("meta", dtype) for name, one in told.added.items()} or None,
                },
            )
    finally:
        for part in checkpoints:
            part.gradient_checkpointing = True
    size = sum(one.untyped_storage().nbytes() for one in kept.values())
    passes, share = (4, CHECKPOINTED) if checkpoints else (3, 1.0)
    return Work(counter.get_total_flops() * passes, int(size * share))


def speed(dtype: torch.dtype, device: torch.device) -> float:
    """Return floating-point operations a second in a square product, the best of three."""
    one = torch.ones(_SIDE, _SIDE, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        float((one @ one)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * _SIDE**3 / best


def _about(minutes: float) -> str:
    whole = max(1, round(minutes))
    return f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{whole} minute{'s' * (whole != 1)}"
