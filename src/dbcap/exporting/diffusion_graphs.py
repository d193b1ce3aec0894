"""The parts of a diffusion pipeline as ONNX graphs, with the names that Optimum's exporter gives them.

Their contract, by the files of optimum-onnx 0.1: a text encoder's `input_ids` -> `last_hidden_state`, `pooler_output`,
or `text_embeds` first where it has a projection, and of SDXL's both `hidden_states.N`; the denoiser's `sample`,
`timestep`, `encoder_hidden_states`, of SDXL's `text_embeds` and `time_ids` too -> `out_sample`; the autoencoder's
`sample` -> `latent_parameters`, and `latent_sample` -> `sample`. The time is one number for all rows, which need not be
whole. All numbers that go in and out are float32, whatever those inside are. B rows, T tokens, C width, X of the
projection, h x w latents of a picture of H x W.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional

from dbcap.exporting import graphs
from dbcap.exporting.halves import Product

ROW, TOKEN = "batch_size", "sequence_length"
SIZE = (13, 15)
"""Latents that the denoiser is traced with: odd, so that it puts any number of them back together."""
_TIMES = 6
"""Numbers that SDXL's denoiser is told of a picture's size."""


class TextEncoder(nn.Module):
    """tokens (B, T) -> what transformers' model returns, in the order of `outputs`."""

    def __init__(self, model: Any, all_layers: bool) -> None:
        super().__init__()
        self.model, self.all_layers = model, all_layers
        projects = hasattr(model, "text_projection")
        self.outputs = ["text_embeds", "last_hidden_state"] if projects else ["last_hidden_state", "pooler_output"]
        """(B, X) and (B, T, C), or (B, T, C) and (B, C)."""

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Encode tokens."""
        found = self.model(input_ids, output_hidden_states=self.all_layers)
        layers = found.hidden_states if self.all_layers else ()
        return tuple(one.float() for one in (*(found[name] for name in self.outputs), *layers))


class Denoiser(nn.Module):
    """latents (B, c, h, w), a time, states (B, T, C), of SDXL (B, X) and (B, 6) more -> (B, c, h, w)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict."""
        dtype, added = self.model.dtype, None
        if text_embeds is not None:
            added = {"text_embeds": text_embeds, "time_ids": time_ids}  # put together first, and then made that dtype
        states = encoder_hidden_states.to(dtype)
        predicted: torch.Tensor = self.model(sample.to(dtype), timestep, states, added_cond_kwargs=added).sample
        return predicted.float()


class Encoder(nn.Module):
    """pictures (B, 3, H, W) from -1 to 1 -> mean and log-variance of their latents (B, 2 c, h, w)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """Encode."""
        found: torch.Tensor = self.model.encode(sample.to(self.model.dtype)).latent_dist.parameters
        return found.float()


class Decoder(nn.Module):
    """latents (B, c, h, w) -> pictures (B, 3, H, W) from -1 to 1."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        """Decode."""
        picture: torch.Tensor = self.model.decode(latent_sample.to(self.model.dtype)).sample
        return picture.float()


def text_encoder(model: Any, all_layers: bool, name: str) -> ir.Model:
    """Return the graph of a CLIP text encoder, which is of no use afterwards; with `all_layers` as SDXL reads it.

    Here and below the weights are the model's, not copies, but for those of linear layers. Raises ModelError.
    """
    simplify(model)
    model.set_attn_implementation("eager")
    module = TextEncoder(model, all_layers)
    layers = range(model.config.num_hidden_layers + 1) if all_layers else ()
    outputs = [*module.outputs, *(f"hidden_states.{number}" for number in layers)]
    tokens = torch.zeros(2, model.config.max_position_embeddings, dtype=torch.int64)
    return graphs.export(module, (tokens,), ({0: ROW, 1: TOKEN},), ["input_ids"], outputs, name)


def unet(model: Any, name: str) -> ir.Model:
    """Return the graph of a denoiser."""
    simplify(model)
    config = model.config
    args = [torch.zeros(2, config.in_channels, *SIZE), torch.tensor(1.0), torch.zeros(2, 5, config.cross_attention_dim)]
    shapes: list[dict[int, str]] = [{0: ROW, 2: "height", 3: "width"}, {}, {0: ROW, 1: TOKEN}]
    inputs = ["sample", "timestep", "encoder_hidden_states"]
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - _TIMES * config.addition_time_embed_dim
        args += [torch.zeros(2, width), torch.zeros(2, _TIMES)]
        shapes += [{0: ROW}, {0: ROW}]
        inputs += ["text_embeds", "time_ids"]
    return graphs.export(Denoiser(model), tuple(args), tuple(shapes), inputs, ["out_sample"], name)


def vae_encoder(model: Any, name: str) -> ir.Model:
    """Return the graph of an autoencoder's first half."""
    simplify(model)
    side = 4 * 2 ** (len(model.config.block_out_channels) - 1)
    pictures = torch.zeros(2, model.config.in_channels, side, 2 * side)
    shapes = ({0: ROW, 2: "sample_height", 3: "sample_width"},)
    return graphs.export(Encoder(model), (pictures,), shapes, ["sample"], ["latent_parameters"], name)


def vae_decoder(model: Any, name: str) -> ir.Model:
    """Return the graph of an autoencoder's second half."""
    simplify(model)
    latents = torch.zeros(2, model.config.latent_channels, *SIZE)
    shapes = ({0: ROW, 2: "latent_height", 3: "latent_width"},)
    return graphs.export(Decoder(model), (latents,), shapes, ["latent_sample"], ["sample"], name)


class Upsample(nn.Module):
    """diffusers' layer without its precautions, which depend on sizes: (B, C, h, w) -> twice that size, or another."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: torch.Tensor, size: Any = None) -> torch.Tensor:
        """Make it larger."""
        larger = functional.interpolate(x, size, None if size is not None else 2.0)
        convolved: torch.Tensor = self.convolution(larger)
        return convolved


def simplify(model: nn.Module) -> None:
    """Give linear layers the form that becomes one MatMul and one Add; nothing is to be trained any more."""
    model.eval().requires_grad_(False)
    child: Any
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, Product(child.weight.T.contiguous(), child.bias))
            elif _is_plain_upsampler(child):
                setattr(module, name, Upsample(child.conv))


def _is_plain_upsampler(module: nn.Module) -> bool:
    convolution = getattr(module, "conv", None)
    return isinstance(module, Upsample2D) and not module.norm and isinstance(convolution, nn.Conv2d)
