"""From the files of a captioner to one that runs: which engine, where and in which number format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dbcap.errors import UsageError
from dbcap.events import Events
from dbcap.models import cpu, device, exported
from dbcap.models.device import Choice
from dbcap.models.hub import LocalModel
from dbcap.plugins.api import Captioner

if TYPE_CHECKING:
    from collections.abc import Sequence

ENGINES = ("auto", "torch", "onnx")
_DTYPES = {"fp32": "float32", "fp16": "float16"}
_BYTES = {"fp32": 4, "fp16": 2, "int8": 1, "q4": 0.6}


@dataclass(frozen=True)
class Ready:
    """A loaded captioner and how it runs."""

    captioner: Captioner
    choice: Choice
    check: Callable[[Mapping[str, Any]], None] = lambda _: None
    """Raises UsageError for settled options that it cannot work with."""


def kind_for(engine: str) -> str:
    """Return the kind of model (see `hub.locate`) that an engine runs."""
    return "onnx" if engine == "onnx" else "captioner"


def load(
    local: LocalModel,
    events: Events,
    *,
    engine: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    batch_size: str | int = "auto",
    compiled: bool = False,
) -> Ready:
    """Load a captioner; `compiled`: with torch.compile, where it is of use, and else say why not.

    Raises ModelError for a model that is none or not whole, UsageError for an engine, device or dtype it cannot have.
    """
    if local.onnx:
        return _exported(local, events, engine, device, dtype, batch_size, compiled)
    from dbcap.captioning import captioner as of_torch  # it imports torch

    choice = _choose(events, device, dtype, batch_size, of_torch.count_parameters(local.folder))
    loaded = of_torch.load(local, choice, events, compiled=compiled)
    return Ready(loaded, choice, lambda options: of_torch.check(loaded, options))


def _choose(events: Events, place: str, dtype: str, batch_size: str | int, parameters: int) -> Choice:
    choice = device.choose(device=place, dtype=dtype, batch_size=batch_size, parameters=parameters)
    _explain(choice.why, events)
    return choice


def _explain(why: Sequence[str], events: Events) -> None:
    for reason in why:
        events.detail(reason)


def _exported(
    local: LocalModel, events: Events, engine: str, place: str, dtype: str, batch_size: str | int, compiled: bool
) -> Ready:
    from dbcap.captioning.exported import ExportedCaptioner

    assert local.onnx
    name = local.spec.text
    if engine == "torch":
        raise UsageError(f"{name} has ONNX files only, which torch does not run", "the engine onnx does")
    if place not in ("auto", "cpu"):
        raise UsageError(f"the ONNX engine runs on the CPU, not on {place}", "choose --device cpu")
    if compiled:
        events.say("--compile is left out: torch.compile has no part in the ONNX engine")
    encoder, decoder = local.onnx
    standard = exported.standard_in(local.folder) if encoder.parent == local.folder else "fp32"
    variant = encoder.stem.removeprefix("encoder_model").lstrip("_") or standard
    if dtype not in ("auto", _DTYPES.get(variant)):
        raise UsageError(f"{name} is {variant}, and not {dtype}", "choose --dtype auto")
    parameters = int(sum(path.stat().st_size for path in local.onnx) / _BYTES.get(variant, 4))
    choice = device.choose(
        device="cpu", dtype="float32", batch_size=batch_size, parameters=parameters, threads=cpu.cores()
    )
    files = f"{encoder.name} and {decoder.name}"
    choice = replace(choice, why=(f"engine: ONNX Runtime on the CPU, {files}", *choice.why[2:]))
    _explain(choice.why, events)
    loaded = ExportedCaptioner(local.folder, name, encoder, decoder, choice.threads)
    return Ready(loaded, choice)
