"""What runs a diffusion model: torch, or ONNX Runtime with an exported one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dbcap.config.models import GenerateConfig
from dbcap.errors import UsageError
from dbcap.models import cpu

if TYPE_CHECKING:
    from dbcap.models.device import Choice
    from dbcap.models.hub import LocalModel


def kind_for(engine: str) -> str:
    """Return the kind of model (see `hub.locate`) that an engine runs."""
    return "diffusion-onnx" if engine == "onnx" else "diffusion"


def choose(config: GenerateConfig, local: LocalModel, threads: int | None) -> Choice:
    """Choose where and how a model runs; imports torch. Raises UsageError for an engine, device or dtype it has not."""
    from dbcap.models import device

    if not local.onnx:
        return device.choose(
            device=config.device, dtype=config.dtype, batch_size=1, parameters=local.parameters, threads=threads
        )
    name = local.spec.text
    if config.engine == "torch":
        raise UsageError(f"{name} has ONNX files only", "leave out --engine torch")
    if config.device not in ("auto", "cpu"):
        raise UsageError(f"the ONNX engine runs on the CPU, not on {config.device}", "choose --device cpu")
    if config.dtype not in ("auto", "float32"):  # which is what goes in and comes out
        raise UsageError(f"the number format of {name} is that of its files", "choose --dtype auto")
    choice = device.choose(
        device="cpu",
        dtype="float32",
        batch_size=1,
        parameters=local.parameters,
        threads=threads or cpu.cores(),
    )
    return replace(choice, why=("engine: ONNX Runtime on the CPU", "numbers: those of its files", *choice.why[2:]))
