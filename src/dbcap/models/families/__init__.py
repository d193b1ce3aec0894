"""One file a diffusion family: what differs between Stable Diffusion 1/2, SDXL and what comes after is asked of it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from dbcap.errors import ModelError
from dbcap.models import pipelines
from dbcap.models.families.description import Description
from dbcap.models.layout import CONFIG, PIPELINE

if TYPE_CHECKING:
    from dbcap.models.families.sd import StableDiffusion
    from dbcap.models.hub import LocalModel

_SD, _XL = "sd:StableDiffusion", "sdxl:StableDiffusionXL"
FAMILIES = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionInpaintPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": _SD,
    "StableDiffusionXLPipeline": _XL,
    "StableDiffusionXLInpaintPipeline": _XL,
    "StableDiffusionXLImg2ImgPipeline": _XL,
}
"""`_class_name` of a model_index.json -> module and class of its family, which import torch."""


def describe(local: LocalModel) -> Description:
    """Return what a pipeline's small files tell. Raises ModelError for one of no family."""
    _family(local)
    return Description(local)


def load(local: LocalModel, device: str, dtype: str) -> StableDiffusion:
    """Return the family object of a pipeline; its parts are read when they are used. Raises ModelError."""
    module, _, name = _family(local).partition(":")
    if local.onnx:
        module, name = "onnx", f"Exported{name}"
    family: type[StableDiffusion] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return family(local, device, dtype)


def _family(local: LocalModel) -> str:
    kind = pipelines.class_name(local.folder)
    if local.onnx:
        kind = kind.removeprefix("ORT")  # Optimum's own classes have the names of diffusers'
    if kind not in FAMILIES:
        what = f"is a {kind}, which dbcap does not know" if kind else "names no kind of pipeline"
        raise ModelError(f"{local.spec.text} {what}", "dbcap knows Stable Diffusion 1.x, 2.x and XL")
    second = "text_encoder_2"
    has = second in local.single.parts if local.single else (local.folder / second / CONFIG).is_file()
    if has != (FAMILIES[kind] is _XL):
        what = f"names a {kind}, and {local.spec.text} has {'a' if has else 'no'} {second}"
        raise ModelError(f"{local.folder / PIPELINE} {what}", "it belongs to another model")
    return FAMILIES[kind]
