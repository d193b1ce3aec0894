"""What a pipeline's small files tell: sizes, words and names. Without weights, and without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dbcap.errors import ModelError, UsageError
from dbcap.models import identity, pipelines
from dbcap.models.identity import Identity
from dbcap.models.layout import CONFIG, read_object
from dbcap.models.pipelines import DECODER, SCHEDULER

if TYPE_CHECKING:
    from dbcap.models.hub import LocalModel

_USUAL: dict[str, dict[str, Any]] = {
    "unet": {"in_channels": 4, "sample_size": 64},
    "vae": {"scaling_factor": 0.18215, "latent_channels": 4, "force_upcast": True},
    "text_encoder": {"max_position_embeddings": 77},
    "text_encoder_2": {"max_position_embeddings": 77},
}
"""What configs, SD 1.5's of 2022 among them, may leave out, as diffusers and transformers take it."""


_Rule = tuple[Callable[[Any], bool], str]
"""What a value must be, and what to say of one that is not."""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_count, value))


def _one_of(*names: str) -> _Rule:
    return names.__contains__, f"is none of {', '.join(names)}"


_NUMBER: _Rule = _is_number, "is no number"
_SCALE: _Rule = lambda value: _is_number(value) and value > 0, "is no number above 0"
_COUNT: _Rule = _is_count, "is no whole number above 0"
_COUNTS: _Rule = _is_counts, "is no list of whole numbers above 0"
_TEXT: _Rule = lambda value: isinstance(value, str), "is no text"
_NEEDED: dict[str, dict[str, _Rule]] = {
    "unet": {"in_channels": _COUNT, "sample_size": _COUNT},
    "vae": {"block_out_channels": _COUNTS, "latent_channels": _COUNT, "scaling_factor": _SCALE},
    "text_encoder": {"max_position_embeddings": _COUNT},
    "text_encoder_2": {"max_position_embeddings": _COUNT},
    "scheduler": {"_class_name": _TEXT},
}
_OPTIONAL: dict[str, dict[str, _Rule]] = {
    "unet": {"block_out_channels": _COUNTS},
    "vae": {"shift_factor": _NUMBER},
    "scheduler": {
        "num_train_timesteps": _COUNT,
        "beta_start": _NUMBER,
        "beta_end": _NUMBER,
        "steps_offset": _NUMBER,
        "prediction_type": _one_of("epsilon", "sample", "v_prediction"),
        "timestep_spacing": _one_of("linspace", "leading", "trailing"),
    },
}
"""Part -> key that we or a sampler's steps read -> what is allowed; the rest the class checks when it is made."""


class Description:
    """A pipeline whose parts nobody has loaded."""

    def __init__(self, local: LocalModel) -> None:
        self._local = local
        self.name, self.folder = local.spec.text, local.folder
        path = local.single.path if local.single else local.spec.path and local.folder
        path = None if local.trained else path
        self.address = str(path or local.spec.text)
        """What `--model` takes to find it from any folder."""
        self.run = local.trained.run if local.trained else ""
        """The run that made it, where one did; and its step there."""
        self.step = local.trained.step if local.trained else 0
        self.title = self.run or (path.name.removesuffix(".safetensors") if path else local.spec.text)
        """What it is called, wherever it lies."""
        self.exported = bool(local.onnx)
        """Whether it is run by ONNX files."""

    def config(self, part: str) -> dict[str, Any]:
        """Return the config.json of a part, with what it leaves out. Raises ModelError for a damaged one."""
        folder = DECODER if part == "vae" and self.exported else part
        config = _checked(self.folder / folder / CONFIG, part)
        if part == "unet" and self._local.single:  # the base may inpaint, and the file not, or the other way round
            config["in_channels"] = self._local.single.in_channels
        return config

    @cached_property
    def unet_config(self) -> dict[str, Any]:
        """The denoiser's config."""
        return self.config("unet")

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The autoencoder's config."""
        return self.config("vae")

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """What the model's own scheduler_config.json says, its class under `_class_name`."""
        return _checked(self.folder / SCHEDULER, "scheduler")

    @property
    def parameters(self) -> int:
        """How many weights it has. Raises ModelError for a damaged file."""
        return self._local.parameters

    def identity_with(self, files: Iterable[Path]) -> Identity:
        """Return the identifier and the class word of a model, and of LoRA and embedding files, that dbcap trained.

        Raises UsageError where they differ, and for files beside ONNX files.
        """
        files = list(files)
        if self.exported and files:
            self.refuse(files[0])
        made = self._local.trained
        said = [(self.name, made.identity if made else identity.of_folder(self.folder))]
        return identity.agreed([*said, *((str(path), identity.of_header(path)) for path in files)])

    def refuse(self, path: Path) -> NoReturn:
        """Refuse a LoRA or embedding file, of which ONNX files take none."""
        hint = "add it to the model they were made of"
        raise UsageError(f"{self.name} has ONNX files, to which {path} cannot be added", hint)

    @property
    def factor(self) -> int:
        """Pixels a latent: widths and heights are multiples of it."""
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    @property
    def size(self) -> int:
        """Width and height that the model was trained with, in pixels."""
        return int(self.unet_config["sample_size"]) * self.factor

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.vae_config["latent_channels"])

    @property
    def inpaints(self) -> bool:
        """Whether the denoiser itself takes a mask and the masked image."""
        return int(self.unet_config["in_channels"]) == 2 * self.latent_channels + 1

    @property
    def has_checker(self) -> bool:
        """Whether it has a safety checker: not XL, not a single file, and no ONNX files."""
        return not self._local.single and not self.exported and pipelines.has_checker(self.folder)


def _checked(path: Path, part: str) -> dict[str, Any]:
    """Read a config, and add what is usual. Raises ModelError, naming the file, for a value that cannot be used."""
    config = _USUAL.get(part, {}) | read_object(path)
    needed, optional = (rules.get(part, {}) for rules in (_NEEDED, _OPTIONAL))
    for key, (allowed, wrong) in (needed | optional).items():
        value = config.get(key)
        if not (allowed(value) or (value is None and key in optional)):
            what = f"{key} = {json.dumps(value)[:40]} {wrong}" if key in config else f"it has no {key}"
            raise ModelError(f"{path} is damaged: {what}", "fetch or copy the model again")
    return config
