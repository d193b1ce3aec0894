"""What a pipeline's small files tell: sizes, words and names. Without weights, and without torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbcap.errors import ModelError
from dbcap.models import identity, pipelines
from dbcap.models.identity import Identity
from dbcap.models.layout import CONFIG

if TYPE_CHECKING:
    from dbcap.models.hub import LocalModel

_USUAL: dict[str, dict[str, Any]] = {
    "unet": {"in_channels": 4, "sample_size": 64},
    "vae": {"scaling_factor": 0.18215, "latent_channels": 4, "force_upcast": True},
}
"""What the configs of 2022, SD 1.5's among them, do not say, as diffusers takes it."""


class Description:
    """A pipeline whose parts nobody has loaded."""

    def __init__(self, local: LocalModel) -> None:
        self._local = local
        self.name, self.folder = local.spec.text, local.folder
        path = local.single.path if local.single else local.spec.path and local.folder
        self.address = str(path or local.spec.text)
        """What `--model` takes to find it from any folder."""
        self.title = path.name.removesuffix(".safetensors") if path else local.spec.text
        """What it is called, wherever it lies."""

    def config(self, part: str) -> dict[str, Any]:
        """Return the config.json of a part, with what it leaves out. Raises ModelError for a damaged one."""
        config: dict[str, Any] = _USUAL.get(part, {}) | _document(self.folder / part / CONFIG)
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

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """What the model's own scheduler_config.json says, its class under `_class_name`."""
        path = self.folder / "scheduler" / "scheduler_config.json"
        return _document(path) if path.is_file() else {}

    @property
    def parameters(self) -> int:
        """How many weights it has. Raises ModelError for a damaged file."""
        return self._local.parameters

    def identity_with(self, files: Iterable[Path]) -> Identity:
        """Return the identifier and the class word of a model, and of LoRA and embedding files, that dbcap trained."""
        said = [(self.name, identity.of_folder(self.folder))]
        return identity.agreed([*said, *((str(path), identity.of_header(path)) for path in files)])

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
        """Whether it has a safety checker: not XL, and not a single file."""
        return not self._local.single and pipelines.has_checker(self.folder)


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged: {error}", "fetch or copy the model again") from error
    return document
