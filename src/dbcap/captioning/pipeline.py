"""`dbcap.pipeline`: loads a captioner as transformers v4's `pipeline("image-to-text")` did."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from dbcap.captioning.api import DEFAULT_MODEL, load
from dbcap.captioning.captioner import FAMILIES, TransformersCaptioner
from dbcap.captioning.image_to_text import ImageToTextPipeline
from dbcap.errors import ModelError, UsageError, did_you_mean
from dbcap.models import device as devices

TASK = ImageToTextPipeline.task


def pipeline(
    task: str | None = None,
    model: Any = None,
    *,
    tokenizer: Any = None,
    image_processor: Any = None,
    feature_extractor: Any = None,
    revision: str | None = None,
    engine: str = "auto",
    device: int | str | torch.device | None = None,
    torch_dtype: str | torch.dtype | None = None,
    dtype: str | torch.dtype | None = None,
    offline: bool = False,
    allow_pickle: bool = True,
    **settings: Any,
) -> ImageToTextPipeline:
    """Load what v4's `pipeline("image-to-text", model=...)` loaded; the task may be left out.

    `model` is `starter`, `org/name` on the hub (with `revision`), a folder, or a transformers model with its
    `tokenizer` and `image_processor` (or, as it once was called, `feature_extractor`).
    `device` is a number (-1: the CPU), a name or a torch device; without it the first GPU, else the CPU.
    `dtype` (or `torch_dtype`) is torch's or its name; float32 if not given, and auto lets dbcap choose.
    `settings` are those of a call (`batch_size`, `prompt`, `strip` ...) and of the generation config (`num_beams` ...).

    Raises UsageError for another task and for what cannot go together, TypeError for an unknown keyword, ModelError
    for what cannot be loaded.
    """
    if task not in (TASK, None):
        near = did_you_mean(str(task), [TASK])
        raise UsageError(f"there is no task {task!r}: the only one is {TASK!r}", near or "models go into model=")
    if dtype is not None and torch_dtype is not None and _name(dtype) != _name(torch_dtype):
        raise UsageError("dtype and torch_dtype differ", "give one of them")
    number = torch_dtype if dtype is None else dtype
    processor = feature_extractor if image_processor is None else image_processor
    if model is not None and not isinstance(model, str | os.PathLike):
        captioner = _around(model, tokenizer, processor, _device(device), number)
        return ImageToTextPipeline(captioner, own_search=False, **settings)
    spec = DEFAULT_MODEL if model is None else os.fspath(model)
    loaded = load(
        f"{spec}@{revision}" if revision else spec,
        engine="torch" if engine == "auto" else engine,
        device=_device(device),
        dtype=_name(number or ("auto" if engine == "onnx" else "float32")),
        offline=offline,
        allow_pickle=allow_pickle,
    ).captioner
    if not isinstance(loaded, TransformersCaptioner):
        raise ModelError(f"{spec} is no model of transformers: it gives no pipeline", "use dbcap.Captioner")
    _replace(loaded, model, tokenizer, processor)
    return ImageToTextPipeline(loaded, **settings)


def _replace(captioner: TransformersCaptioner, model: Any, tokenizer: Any, processor: Any) -> None:
    """Put the user's own tokenizer and image processor in; v4 took the model's name for them as well."""
    for name, value in (("tokenizer", tokenizer), ("image_processor", processor)):
        if isinstance(value, str | os.PathLike) and value != model:
            raise UsageError(f"{name}={value!r} is not the model's", f"leave it out, or give the {name} itself")
    if tokenizer is not None and tokenizer != model:
        captioner.tokenizer = tokenizer
    if processor is not None and processor != model:
        captioner.image_processor = _AsArrays(processor)


def _name(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device(device: int | str | torch.device | None) -> str:
    """Return a device by dbcap's name. As in v4 a number means the CPU where there is no GPU."""
    if device is None:
        return "auto"
    if not isinstance(device, int):
        return str(device)
    kinds = {one.device.partition(":")[0] for one in devices.accelerators()} if device >= 0 else set()
    return f"cuda:{device}" if "cuda" in kinds else "mps" if "mps" in kinds else "cpu"


def _around(model: Any, tokenizer: Any, processor: Any, device: str, dtype: Any) -> TransformersCaptioner:
    """Return a captioner of a transformers model that is loaded already; it is moved to `device`, and used as it is."""
    kind = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    if kind is None:
        raise UsageError(f"{type(model).__name__} captions no images here", f"dbcap knows {', '.join(FAMILIES)}")
    if tokenizer is None or processor is None or isinstance(tokenizer, str) or isinstance(processor, str):
        raise UsageError("a model object comes alone", "give its tokenizer= and image_processor= too")
    if dtype is not None and _name(dtype) not in (_name(model.dtype), "auto"):
        raise UsageError(f"the model is in {_name(model.dtype)}, not {_name(dtype)}", "convert it by model.to(dtype)")
    place = devices.choose(device=device, dtype=_name(model.dtype), parameters=0).device
    return kind.around(model, tokenizer, _AsArrays(processor), place)


class _AsArrays:
    """An image processor that may give torch tensors only, made to give arrays."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __call__(self, images: Image.Image, return_tensors: str) -> dict[str, npt.NDArray[np.float32]]:  # noqa: ARG002
        return {"pixel_values": self.own(images=images, return_tensors="pt")["pixel_values"].float().numpy()}
