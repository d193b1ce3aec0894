"""Diffusion pipelines whose parts are ONNX files, on ONNX Runtime, on the CPU.

Each part does what the families ask of the one of torch, and no more; sampling, prompts and pictures are theirs. B
rows, T tokens, C width, h x w latents of a picture of H x W.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from dbcap.errors import ModelError
from dbcap.models import onnx_session
from dbcap.models.families.sd import StableDiffusion
from dbcap.models.families.sdxl import StableDiffusionXL
from dbcap.models.libraries import clear_errors
from dbcap.models.pipelines import DECODER, ENCODER, ONNX

if TYPE_CHECKING:
    from dbcap.models.trained import Addition

_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


class Graph:
    """One file, loaded."""

    def __init__(self, path: Path, inputs: Collection[str], outputs: Collection[str]) -> None:
        """Load it. Raises ModelError for one that is damaged, wants other inputs or has not these outputs."""
        # A denoiser of SD 1.5's size, 64x64 latents: a peak of 6.5 GB instead of 9.5 in float32, 4.1 instead of 7.3 in
        # int8, and as fast. What is reserved would stay reserved while pictures are decoded.
        self._session = onnx_session.opened(path, torch.get_num_threads(), keeps=False)
        onnx_session.check(self._session, path, inputs, outputs)
        self._path = path
        self._inputs = {one.name: one for one in self._session.get_inputs()}
        self._outputs = [one.name for one in self._session.get_outputs()]

    def run(self, **given: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return all outputs by name, numbers as float32. What the graph does not ask for is left out.

        Raises ModelError for a graph that does not fit what it gets.
        """
        arrays = {}
        for name, about in self._inputs.items():
            array = given[name].numpy(force=True).astype(_TYPES[about.type], copy=False)
            arrays[name] = np.ascontiguousarray(array).reshape(array.shape or (1,) * len(about.shape))
        with onnx_session.run_errors(self._path):
            found = self._session.run(self._outputs, arrays)
        return {name: torch.from_numpy(one).float() for name, one in zip(self._outputs, found, strict=True)}


class TextEncoder:
    """tokens (B, T) -> `last_hidden_state` (B, T, C); of SDXL `hidden_states`, a list of these, and `text_embeds`."""

    def __init__(self, path: Path, layers: int, projects: bool) -> None:
        self._layers = [f"hidden_states.{number}" for number in range(layers)]
        known = ["text_embeds"] if projects else []
        self._graph = Graph(path, ["input_ids"], ["last_hidden_state", *known, *self._layers])

    def __call__(self, ids: torch.Tensor, output_hidden_states: bool = False) -> SimpleNamespace:
        """Encode."""
        found = self._graph.run(input_ids=ids)
        layers = [found[name] for name in self._layers] if output_hidden_states else None
        return SimpleNamespace(**found, hidden_states=layers)


class Denoiser:
    """latents (B, c, h, w), a time, states (B, T, C) and what SDXL adds -> `sample` (B, c, h, w)."""

    def __init__(self, path: Path, added: Collection[str]) -> None:
        self._graph = Graph(path, ["sample", "timestep", "encoder_hidden_states", *added], ["out_sample"])

    def __call__(
        self,
        latents: torch.Tensor,
        time: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    ) -> SimpleNamespace:
        """Predict."""
        given = {"sample": latents, "timestep": time, "encoder_hidden_states": encoder_hidden_states}
        return SimpleNamespace(sample=self._graph.run(**given, **(added_cond_kwargs or {}))["out_sample"])


class _Half(nn.Module):
    """A half of an autoencoder, loaded when it is first used."""

    def __init__(self, path: Path, given: str, found: str) -> None:
        super().__init__()
        self._path, self._given, self._found = path, given, found

    @cached_property
    def _graph(self) -> Graph:
        return Graph(self._path, [self._given], [self._found])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._graph.run(**{self._given: x})[self._found]


class Autoencoder(AutoencoderKL):
    """diffusers' autoencoder around two files, for its tiles and its distribution."""

    @property
    def dtype(self) -> torch.dtype:
        """The number format of pictures and latents."""
        return torch.float32


class Exported(StableDiffusion):
    """What the families have in common whose parts are ONNX files."""

    def add(self, one: Addition) -> NoReturn:
        """Refuse a LoRA or embedding file."""
        self.refuse(one.path)

    def plain(self, part: str, dtype: torch.dtype | None = None) -> NoReturn:  # noqa: ARG002 - a family's signature
        """Refuse to be exported or made one file."""
        raise ModelError(f"{self.name} has ONNX files only", "take the model that they were made of")

    def module(self, part: str, dtype: torch.dtype) -> NoReturn:
        """Refuse to be trained."""
        self.plain(part, dtype)

    def _text_encoders(self) -> list[Any]:
        if self._encoders is None:
            two = len(self.text_parts) > 1
            self._encoders = []
            for place, (_, part, _) in enumerate(self.text_parts):
                layers = self.config(part)["num_hidden_layers"] + 1 if two else 0
                self._encoders.append(TextEncoder(self.folder / part / ONNX, layers, projects=place > 0))
        return self._encoders

    @cached_property
    def unet(self) -> Any:
        """The denoiser."""
        added = ("text_embeds", "time_ids") if len(self.text_parts) > 1 else ()
        return Denoiser(self.folder / "unet" / ONNX, added)

    @cached_property
    def vae(self) -> Any:
        """The autoencoder."""
        config = self.vae_config | {"use_quant_conv": False, "use_post_quant_conv": False}  # they are in the files
        with clear_errors(self._called("vae")), torch.device("meta"):
            model: Any = Autoencoder.from_config(config)
        model.encoder = _Half(self.folder / ENCODER / ONNX, "sample", "latent_parameters")
        model.decoder = _Half(self.folder / DECODER / ONNX, "latent_sample", "sample")
        return model


class ExportedStableDiffusion(Exported):
    """Stable Diffusion 1.x or 2.x."""


class ExportedStableDiffusionXL(Exported, StableDiffusionXL):
    """SDXL."""
