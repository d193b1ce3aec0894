"""The samplers by the names that people know them by, over diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dbcap.errors import ModelError, UsageError, did_you_mean

_DPM = {"algorithm_type": "dpmsolver++", "use_karras_sigmas": False}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", _DPM),
    "dpm++-karras": ("DPMSolverMultistepScheduler", _DPM | {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}
"""Name -> class of diffusers and what it sets beyond the model's own scheduler_config.json."""
_COMMON = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
    *("rescale_betas_zero_snr", "timestep_spacing", "steps_offset"),
)
"""What a noise schedule has that every sampler of it needs; the rest belongs to the one it was written for."""


OWN = "model"
"""What a job says of the model's own scheduler."""


def same_as(name: str, config: Mapping[str, Any]) -> str:
    """Return the name in `SCHEDULERS` that a job's sampler is; of the model's own, if none, its class."""
    if name != OWN:
        return name
    own, karras = str(config.get("_class_name", "DDIMScheduler")), bool(config.get("use_karras_sigmas"))
    for one, (kind, more) in SCHEDULERS.items():
        if kind == own and bool(more.get("use_karras_sigmas")) == karras:
            return one
    return own.removesuffix("Scheduler")


def kept_steps(steps: int, strength: float) -> int:
    """Return how many of `steps` image to image takes: none where `strength` is too low for one."""
    return min(int(steps * strength + 1e-9), steps)


def known(name: str | None) -> str:
    """Return the name of a scheduler as jobs say it. Raises UsageError for one that is unknown."""
    if name is not None and name not in SCHEDULERS:
        near = did_you_mean(name, SCHEDULERS)
        raise UsageError(f"there is no scheduler {name!r}", near or f"use {', '.join(SCHEDULERS)}")
    return OWN if name is None else name


def make(name: str, config: Mapping[str, Any]) -> Any:
    """Return a new scheduler, by its name in `SCHEDULERS` or `OWN`, for a model with this scheduler_config.json.

    Raises ModelError for a class that diffusers has not, and for a config that it cannot be made from.
    """
    import diffusers  # a second that planning needs not

    from dbcap.models.libraries import clear_errors  # it imports torch

    if name == OWN:
        own = str(config.get("_class_name", "DDIMScheduler"))
        kind = getattr(diffusers, own, None)
        if kind is None or not own.endswith("Scheduler"):
            raise ModelError(
                f"the model's scheduler {own} is unknown", f"name one: --scheduler {', '.join(SCHEDULERS)}"
            )
        with clear_errors("what the model's scheduler_config.json describes"):
            return kind.from_config(dict(config))
    class_name, more = SCHEDULERS[name]
    shared = {key: config[key] for key in _COMMON if key in config}
    if class_name == "DDIMScheduler":
        shared |= {key: config[key] for key in ("set_alpha_to_one",) if key in config}
        more = {"clip_sample": False, **more}
    with clear_errors("what the model's scheduler_config.json describes"):
        return getattr(diffusers, class_name).from_config({**shared, **more})
