"""Weights as original Stable Diffusion files name them, and as a diffusers folder does; each from the other.

Both layouts hold the same numbers. The original one counts the denoiser's blocks through instead of by level, counts
the decoder's levels from the other end, keeps the autoencoder's attention as 1x1 convolutions, and has two layouts of
text encoders: CLIP's as transformers had it, and OpenCLIP's, with queries, keys and values in one matrix.
The names are read off modules that the configs describe, made without memory, so that any size of model is mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dbcap.errors import ModelError
from dbcap.models.libraries import clear_errors
from dbcap.models.mapped import MappedWeights
from dbcap.models.single_file import CLIP, TEXTS, UNET, VAE, SingleFile

Table = dict[str, str]
"""Module of diffusers or transformers -> key of the original, with `*` where `weight` or `bias` stands."""

_SCHEDULE = {
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "logvar"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    *("scale_factor", "denoiser.sigmas"),
}
"""What training code left in files; the scheduler computes it anew."""


@dataclass(frozen=True)
class _Weight:
    """One tensor of an original file."""

    key: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    """`part.name` of the tensors that it is made of, stacked."""

    @property
    def transposed(self) -> bool:
        return self.key.endswith(".text_projection")

    @property
    def convolution(self) -> bool:
        """Whether the folder's tensor is a matrix, and the file's a 1x1 convolution."""
        return ".attn_1." in self.key and len(self.shape) == 4


def unet_names(unet: UNet2DConditionModel) -> dict[str, str]:
    """Return how original files name the modules of a denoiser, without what all its keys begin with.

    `mid_block.resnets.1.conv2` is `middle_block.2.out_layers.3`; a path may be there that this denoiser has not.
    """
    return {path: key.removesuffix(".*") for path, key in _unet(unet).items()}


def to_original(
    kind: str, configs: Mapping[str, Mapping[str, Any]], parts: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the weights of an original file of a `kind`: "sd1", "sd2" or "xl".

    `configs` are the config.json documents of `unet`, `vae`, `text_encoder` (and `text_encoder_2`), or of some of them;
    `parts` the state dicts of these modules. Dtypes stay; tensors that need no change are not copied. Raises ModelError
    for a name that lacks, is too many or has another shape than the config says.
    """
    weights, shapes = _plan(kind, configs)
    given = {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
    _check("the model", given, shapes)
    state = {}
    for weight in weights:
        tensors = [given[name] for name in weight.names]
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if weight.transposed:
            tensor = tensor.T.contiguous()
        state[weight.key] = tensor[..., None, None] if weight.convolution else tensor
    return state


def from_original(
    kind: str, configs: Mapping[str, Mapping[str, Any]], state: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Return what `to_original` was given, from the weights of an original file: part -> name -> tensor.

    What no folder holds is left out: averages of training, schedules, position numbers, the logit scale and the last
    layer and projection of OpenCLIP, which Stable Diffusion 2 does not use. Raises ModelError like `to_original`.
    """
    weights, _ = _plan(kind, configs)
    left_out = _left_out(kind, configs)
    given = {key: tensor for key, tensor in state.items() if not left_out(key)}
    _check("the file", given, {weight.key: weight.shape for weight in weights})
    parts: dict[str, dict[str, Tensor]] = {}
    for weight in weights:
        tensor = given[weight.key]
        if weight.transposed:
            tensor = tensor.T.contiguous()
        if weight.convolution:
            tensor = tensor[..., 0, 0]
        for name, piece in zip(weight.names, tensor.chunk(len(weight.names)), strict=True):
            part, _, inner = name.partition(".")
            parts.setdefault(part, {})[inner] = piece
    return parts


class OriginalWeights(MappedWeights):
    """The weights of one part of a pipeline in an original file, under the names that its module has."""

    def __init__(self, file: SingleFile, part: str, config: Mapping[str, Any]) -> None:
        super().__init__([file.path])
        self._kind, self._part, self._config = file.kind, part, config
        self._start = {"unet": UNET, "vae": VAE, **TEXTS[file.kind]}[part]

    def tensors(self, dtype: torch.dtype, start: str = "") -> dict[str, Tensor]:
        """Return the part's tensors. Raises ModelError where they are not what its config says."""
        state = super().tensors(dtype, self._start + start)
        return from_original(self._kind, {self._part: self._config}, state)[self._part]


def _left_out(kind: str, configs: Mapping[str, Mapping[str, Any]]) -> Callable[[str], bool]:
    """Return whether a key of a file is one that no folder holds. Only for configs that `_plan` took."""
    exact, starts = set(_SCHEDULE), ["model_ema."]
    for start in TEXTS[kind].values():
        exact |= {start + "embeddings.position_ids", start + "attn_mask"}
    if kind == "sd2" and "text_encoder" in configs:
        start = TEXTS[kind]["text_encoder"]
        # These models read the layer before OpenCLIP's last, so that folders have one layer fewer.
        layers = CLIPTextConfig.from_dict(dict(configs["text_encoder"])).num_hidden_layers
        exact.add(start + "text_projection")
        starts.append(f"{start}transformer.resblocks.{layers}.")
    return lambda key: key in exact or key.startswith(tuple(starts)) or key.endswith(".logit_scale")


def _check(what: str, given: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ModelError unless `given` has just the names and shapes asked for."""
    hint = "the configs are those of another model, or the weights are not whole"
    for name, shape in shapes.items():
        if name not in given:
            raise ModelError(f"{what} lacks the weight {name}", hint)
        if tuple(given[name].shape) != shape:
            raise ModelError(f"{what} has {name} of shape {list(given[name].shape)}, not {list(shape)}", hint)
    extra = sorted(set(given) - set(shapes))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise ModelError(f"{what} has a weight that fits nothing: {extra[0]}{more}", hint)


# ---- the layout


def _plan(kind: str, configs: Mapping[str, Mapping[str, Any]]) -> tuple[list[_Weight], dict[str, tuple[int, ...]]]:
    """Return the weights of the original file, and the shape of every `part.name` of the folder."""
    weights: list[_Weight] = []
    shapes: dict[str, tuple[int, ...]] = {}
    layouts = _layouts(kind)
    for part, config in configs.items():
        make, start, table = layouts[part]
        with clear_errors(f"the {part} that the config describes"):
            with torch.device("meta"):
                module = make(dict(config))
            rows = table(module)
        own = {f"{part}.{name}": tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        groups: dict[str, list[str]] = {}
        for inner, pattern in rows.items():
            for leaf in ("weight", "bias"):
                name = f"{part}.{inner}.{leaf}"
                if name in own:
                    groups.setdefault(start + pattern.replace("*", leaf), []).append(name)
        homeless = own.keys() - {name for names in groups.values() for name in names}
        if homeless:
            raise ModelError(f"an original Stable Diffusion file has no place for {min(homeless)}")
        weights += [_weight(part, key, names, own[names[0]]) for key, names in groups.items()]
        shapes |= own
    return weights, shapes


def _weight(part: str, key: str, names: list[str], shape: tuple[int, ...]) -> _Weight:
    if key.endswith(".text_projection"):
        shape = shape[::-1]
    if part == "vae" and len(shape) == 2:  # only attention has matrices there
        shape = (*shape, 1, 1)
    return _Weight(key, (len(names) * shape[0], *shape[1:]), tuple(names))


def _layouts(kind: str) -> dict[str, tuple[Callable[[dict], Any], str, Callable[[Any], Table]]]:
    """Return for every part what makes it from its config, what its keys begin with, and its table."""
    texts = {
        part: (_text_maker(part), start, _clip if start.endswith(CLIP) else _open_clip)
        for part, start in TEXTS[kind].items()
    }
    return {
        "unet": (UNet2DConditionModel.from_config, UNET, _unet),
        "vae": (AutoencoderKL.from_config, VAE, _vae),
        **texts,
    }


def _text_maker(part: str) -> Callable[[dict], Any]:
    kind = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
    return lambda config: kind(CLIPTextConfig.from_dict(config))


def _within(module: str, target: str, inner: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, pattern in inner.items():
        yield f"{module}.{name}", f"{target}.{pattern}"


def _same(module: nn.Module) -> Table:
    """Return the table of a module whose inner names are the same in both."""
    return {name: f"{name}.*" for name, _ in module.named_modules() if name}


# ---- denoiser

_UNET_RESNET = {
    "norm1": "in_layers.0.*",
    "conv1": "in_layers.2.*",
    "time_emb_proj": "emb_layers.1.*",
    "norm2": "out_layers.0.*",
    "conv2": "out_layers.3.*",
    "conv_shortcut": "skip_connection.*",
}


def _unet(unet: Any) -> Table:
    """Return the table of a UNet2DConditionModel.

    A layer and the attention after it are one block of the original; a downsampler is one by itself.
    """
    table = {
        "conv_in": "input_blocks.0.0.*",
        "time_embedding.linear_1": "time_embed.0.*",
        "time_embedding.linear_2": "time_embed.2.*",
        "add_embedding.linear_1": "label_emb.0.0.*",
        "add_embedding.linear_2": "label_emb.0.2.*",
        "conv_norm_out": "out.0.*",
        "conv_out": "out.2.*",
    }
    number = 1
    for level, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            table.update(_layer(block, f"down_blocks.{level}", layer, f"input_blocks.{number}"))
            number += 1
        if block.downsamplers:
            table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op.*"
            number += 1
    middle = unet.mid_block
    if middle is not None:
        table.update(_layer(middle, "mid_block", 0, "middle_block"))
        table.update(_within("mid_block.resnets.1", "middle_block.2", _UNET_RESNET))
    number = 0
    for level, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            table.update(_layer(block, f"up_blocks.{level}", layer, f"output_blocks.{number}"))
            number += 1
        # An upsampler is the last thing in its level's last block.
        after = 2 if getattr(block, "attentions", None) else 1
        table[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{after}.conv.*"
    return table


def _layer(block: Any, module: str, layer: int, target: str) -> Iterator[tuple[str, str]]:
    """Yield the rows of one ResNet block and of the attention after it, if there is one."""
    yield from _within(f"{module}.resnets.{layer}", f"{target}.0", _UNET_RESNET)
    attentions = getattr(block, "attentions", [])
    if len(attentions) > layer and isinstance(attentions[layer], Transformer2DModel):
        yield from _within(f"{module}.attentions.{layer}", f"{target}.1", _same(attentions[layer]))


# ---- autoencoder

_VAE_RESNET = {
    **{name: f"{name}.*" for name in ("norm1", "conv1", "norm2", "conv2")},
    "conv_shortcut": "nin_shortcut.*",
}
_VAE_ATTENTION = {"group_norm": "norm.*", "to_q": "q.*", "to_k": "k.*", "to_v": "v.*", "to_out.0": "proj_out.*"}


def _vae(vae: Any) -> Table:
    """Return the table of an AutoencoderKL."""
    table = {"quant_conv": "quant_conv.*", "post_quant_conv": "post_quant_conv.*"}
    last = len(vae.decoder.up_blocks) - 1
    levels = [("encoder", f"down_blocks.{n}", f"down.{n}", block) for n, block in enumerate(vae.encoder.down_blocks)]
    levels += [("decoder", f"up_blocks.{n}", f"up.{last - n}", block) for n, block in enumerate(vae.decoder.up_blocks)]
    for half, module, target, block in levels:
        for layer in range(len(block.resnets)):
            table.update(_within(f"{half}.{module}.resnets.{layer}", f"{half}.{target}.block.{layer}", _VAE_RESNET))
        table[f"{half}.{module}.downsamplers.0.conv"] = f"{half}.{target}.downsample.conv.*"
        table[f"{half}.{module}.upsamplers.0.conv"] = f"{half}.{target}.upsample.conv.*"
    for half in ("encoder", "decoder"):
        ends = {"conv_in": "conv_in.*", "conv_norm_out": "norm_out.*", "conv_out": "conv_out.*"}
        table.update(_within(half, half, ends))
        for layer in (0, 1):
            table.update(_within(f"{half}.mid_block.resnets.{layer}", f"{half}.mid.block_{layer + 1}", _VAE_RESNET))
        table.update(_within(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", _VAE_ATTENTION))
    return table


# ---- text encoders

_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1.*",
    "layer_norm2": "ln_2.*",
    # Three rows with one target are stacked in this order.
    "self_attn.q_proj": "attn.in_proj_*",
    "self_attn.k_proj": "attn.in_proj_*",
    "self_attn.v_proj": "attn.in_proj_*",
    "self_attn.out_proj": "attn.out_proj.*",
    "mlp.fc1": "mlp.c_fc.*",
    "mlp.fc2": "mlp.c_proj.*",
}


def _clip(encoder: CLIPTextModel) -> Table:
    """Return the table of a text encoder in CLIP's layout, which has the same names."""
    return _same(encoder)


def _open_clip(encoder: CLIPTextModel | CLIPTextModelWithProjection) -> Table:
    """Return the table of a text encoder in OpenCLIP's layout."""
    base = encoder.get_submodule("text_model") if hasattr(encoder, "text_model") else encoder
    table = {
        "embeddings.token_embedding": "token_embedding.*",
        "embeddings.position_embedding": "positional_embedding",
        "final_layer_norm": "ln_final.*",
    }
    for layer in range(len(base.get_submodule("encoder.layers")._modules)):
        table.update(_within(f"encoder.layers.{layer}", f"transformer.resblocks.{layer}", _OPEN_CLIP_LAYER))
    if base is encoder:
        return table
    return {f"text_model.{name}": key for name, key in table.items()} | {"text_projection": "text_projection"}
