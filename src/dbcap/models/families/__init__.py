"""One file a diffusion family: what differs between Stable Diffusion 1/2, SDXL and what comes after is asked of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dbcap.errors import ModelError
from dbcap.models.families.sd import StableDiffusion
from dbcap.models.families.sdxl import StableDiffusionXL
from dbcap.models.layout import PIPELINE

if TYPE_CHECKING:
    from dbcap.models.hub import LocalModel

FAMILIES: dict[str, type[StableDiffusion]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionInpaintPipeline": StableDiffusion,
    "StableDiffusionImg2ImgPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusionXLInpaintPipeline": StableDiffusionXL,
    "StableDiffusionXLImg2ImgPipeline": StableDiffusionXL,
}
"""`_class_name` of a model_index.json -> family."""


def load(local: LocalModel, device: str, dtype: str) -> StableDiffusion:
    """Return the family object of a pipeline; its parts are read when they are used. Raises ModelError."""
    path = local.folder / PIPELINE
    try:
        kind = str(json.loads(path.read_text("utf-8")).get("_class_name"))
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{local.spec.text} has no readable {PIPELINE}: {error}") from error
    if kind not in FAMILIES:
        raise ModelError(
            f"{local.spec.text} is a {kind}, which dbcap does not know", "it knows Stable Diffusion 1.x, 2.x and XL"
        )
    return FAMILIES[kind](local, device, dtype)
