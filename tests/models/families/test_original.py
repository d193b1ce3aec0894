"""Names of original files: round trips, diffusers' own reader, the names of the real models, and what does not fit."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dbcap.errors import ModelError
from dbcap.models.families.original import from_original, to_original, unet_names
from dbcap.models.single_file import kind_of
from dbcap.testing.diffusion import write_diffusion

KINDS = ("sd1", "sd2", "xl")
ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
SIDES = (("down", "En"), ("up", "De"))
DENOISER, AUTOENCODER = "model.diffusion_model.", "first_stage_model."
TEXT = {
    "sd1": "cond_stage_model.transformer.text_model.",
    "sd2": "cond_stage_model.model.",
    "xl": "conditioner.embedders.1.model.",
}


def clip(width, layers, **other):
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, **other}


def autoencoder(channels):
    blocks = {f"{way}_block_types": (f"{way.title()}{half}coderBlock2D",) * len(channels) for way, half in SIDES}
    return {"block_out_channels": channels, "layers_per_block": 2, **blocks}


def tiny_modules(kind):
    """Return modules that, unlike the writer's, have several layers a level, and text encoders of two widths."""
    levels = 4 if kind == "sd2" else 3
    crossed = {"sd1": (1, 1, 0), "sd2": (1, 1, 1, 0), "xl": (0, 1, 1)}[kind]
    added = {}
    if kind == "xl":
        added = {
            "transformer_layers_per_block": (1, 1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24 + 6 * 8,
        }
    modules = {
        "unet": UNet2DConditionModel(
            block_out_channels=(16, 16, 32, 32)[:levels],
            layers_per_block=2,
            norm_num_groups=8,
            down_block_types=["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in crossed],
            up_block_types=["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(crossed)],
            attention_head_dim=2,
            use_linear_projection=kind != "sd1",
            cross_attention_dim=32 + 48 if kind == "xl" else 32,
            in_channels=9 if kind == "sd2" else 4,
            **added,
        ),
        "vae": AutoencoderKL(**autoencoder((8, 16, 16, 32)[:levels]), norm_num_groups=8),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**clip(32, 3, num_attention_heads=2))),
    }
    if kind == "xl":
        modules["text_encoder_2"] = CLIPTextModelWithProjection(
            CLIPTextConfig(**clip(48, 2, num_attention_heads=2, projection_dim=24))
        )
    return modules


def fill_and_write(modules, folder):
    """Give every weight numbers of its own; returns configs and parts.

    As made, many weights are all 0 or 1, and one could pass for another.
    """
    random = torch.Generator().manual_seed(0)
    for name, module in modules.items():
        with torch.no_grad():
            for weight in module.parameters():
                weight.normal_(generator=random)
        module.save_pretrained(folder / name)
    configs = {name: json.loads((folder / name / "config.json").read_text("utf-8")) for name in modules}
    return configs, {name: module.state_dict() for name, module in modules.items()}


@pytest.fixture(scope="module", params=[*KINDS, "the writer's sd1"])
def pipeline(request, tmp_path_factory):
    """Return kind, folder with configs only, configs, parts."""
    kind = request.param[-3:].strip()
    whole = write_diffusion(tmp_path_factory.mktemp("original") / "whole", xl=kind == "xl")
    if request.param in KINDS:
        modules = tiny_modules(kind)
    else:
        loaded = StableDiffusionPipeline.from_pretrained(whole)
        modules = {name: getattr(loaded, name) for name in ("unet", "vae", "text_encoder")}
    configs, parts = fill_and_write(modules, whole)
    # Without weights, as diffusers takes those of the folder for what it does not find in the file.
    folder = whole.parent / "configs"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return kind, folder, configs, parts


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return configs, parts and file of a tiny Stable Diffusion 1."""
    configs, parts = fill_and_write(tiny_modules("sd1"), tmp_path_factory.mktemp("small"))
    return configs, parts, to_original("sd1", configs, parts)


def differences(parts, others):
    """Return the names of weights that only one has, or that have another type or other numbers."""
    one, two = (
        {f"{part}.{key}": v for part, state in each.items() for key, v in state.items()} for each in (parts, others)
    )
    common = one.keys() & two.keys()
    changed = {name for name in common if one[name].dtype != two[name].dtype or not torch.equal(one[name], two[name])}
    return sorted((one.keys() ^ two.keys()) | changed)


def test_round_trip_through_a_file_keeps_every_bit_and_dtype(pipeline, tmp_path):
    kind, _, configs, parts = pipeline
    parts = parts | {"unet": {name: tensor.bfloat16() for name, tensor in parts["unet"].items()}}
    save_file(to_original(kind, configs, parts), tmp_path / "original.safetensors")
    back = from_original(kind, configs, load_file(tmp_path / "original.safetensors"))
    assert differences(parts, back) == []
    for name, state in back.items():
        save_file(state, tmp_path / f"{name}.safetensors")  # which refuses views and shared memory
        assert differences({name: state}, {name: load_file(tmp_path / f"{name}.safetensors")}) == []


def test_diffusers_reads_the_same_weights_from_the_file(pipeline, tmp_path):
    kind, folder, configs, parts = pipeline
    path = tmp_path / "original.safetensors"
    save_file(to_original(kind, configs, parts), path)
    reader = StableDiffusionXLPipeline if kind == "xl" else StableDiffusionPipeline
    loaded = reader.from_single_file(str(path), config=str(folder), local_files_only=True)
    assert differences({name: getattr(loaded, name).state_dict() for name in parts}, parts) == []


def test_kind_of_a_file(pipeline):
    kind, _, configs, parts = pipeline
    keys = list(to_original(kind, configs, parts))
    assert kind_of(keys) == kind
    assert kind_of([key for key in keys if not key.startswith(DENOISER)]) is None
    assert kind_of([key for key in keys if not key.startswith(TEXT[kind])]) is None


def test_other_files_are_of_no_kind(small):
    _, parts, state = small
    assert kind_of([]) is None
    assert kind_of([key for state in parts.values() for key in state]) is None
    assert kind_of(["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"]) is None
    # XL's refiner has OpenCLIP alone.
    refiner = [key.replace(TEXT["sd1"], "conditioner.embedders.0.model.") for key in state]
    assert kind_of(refiner) is None


# ---- names of the real models


VAE = autoencoder((128, 256, 512, 512))
# Where nothing is said, diffusers' own values are those of Stable Diffusion 1.
UNET_2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
UNET_XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REAL = {
    "sd1": {"unet": {"cross_attention_dim": 768}, "vae": VAE, "text_encoder": clip(768, 12)},
    "sd2": {"unet": UNET_2, "vae": VAE, "text_encoder": clip(1024, 23)},
    "xl": {
        "unet": UNET_XL,
        "vae": VAE,
        "text_encoder": clip(768, 12),
        "text_encoder_2": clip(1280, 32, projection_dim=1280),
    },
}
UNET_KEYS = {
    "time_embed.0.weight": (1280, 320),
    "input_blocks.0.0.weight": (320, 4, 3, 3),
    "input_blocks.1.0.in_layers.0.weight": (320,),
    "input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "middle_block.0.emb_layers.1.weight": (1280, 1280),
    "middle_block.2.out_layers.3.bias": (1280,),
    "out.2.weight": (4, 320, 3, 3),
}
SD_KEYS = {
    "input_blocks.6.0.op.bias": (640,),
    "input_blocks.9.0.op.weight": (1280, 1280, 3, 3),
    "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "output_blocks.5.2.conv.bias": (1280,),
    "output_blocks.8.2.conv.weight": (640, 640, 3, 3),
    "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
    "output_blocks.11.1.transformer_blocks.0.norm3.weight": (320,),
}
BY_KIND = {
    "sd1": {
        **SD_KEYS,
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 768),
        "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "middle_block.1.transformer_blocks.0.attn1.to_out.0.bias": (1280,),
    },
    "sd2": {
        **SD_KEYS,
        "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "input_blocks.1.1.proj_in.weight": (320, 320),
    },
    "xl": {
        "label_emb.0.0.weight": (1280, 2816),
        "label_emb.0.2.bias": (1280,),
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        "middle_block.1.transformer_blocks.9.attn2.to_v.weight": (1280, 2048),
        "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        "output_blocks.8.0.out_layers.0.weight": (320,),
    },
}
VAE_KEYS = {
    "quant_conv.weight": (8, 8, 1, 1),
    "post_quant_conv.bias": (4,),
    "encoder.conv_in.weight": (128, 3, 3, 3),
    "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
    "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "decoder.mid.block_2.conv2.bias": (512,),
    "decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
    "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "decoder.up.3.block.2.norm1.weight": (512,),
    "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    "decoder.conv_out.weight": (3, 128, 3, 3),
}
CLIP_KEYS = {
    "embeddings.token_embedding.weight": (49408, 768),
    "embeddings.position_embedding.weight": (77, 768),
    "encoder.layers.11.self_attn.q_proj.weight": (768, 768),
    "encoder.layers.0.mlp.fc1.weight": (3072, 768),
    "final_layer_norm.bias": (768,),
}
OPEN_CLIP_KEYS = {
    "token_embedding.weight": (49408, 1280),
    "positional_embedding": (77, 1280),
    "transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
    "transformer.resblocks.0.attn.in_proj_bias": (3840,),
    "transformer.resblocks.9.attn.out_proj.weight": (1280, 1280),
    "transformer.resblocks.9.mlp.c_proj.bias": (1280,),
    "transformer.resblocks.9.mlp.c_fc.weight": (5120, 1280),
    "transformer.resblocks.9.ln_2.weight": (1280,),
    "ln_final.weight": (1280,),
    "text_projection": (1280, 1280),
}
TEXT_KEYS = {
    "sd1": {TEXT["sd1"] + key: shape for key, shape in CLIP_KEYS.items()},
    "sd2": {
        TEXT["sd2"] + "positional_embedding": (77, 1024),
        TEXT["sd2"] + "transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
        TEXT["sd2"] + "ln_final.bias": (1024,),
    },
    "xl": {
        **{f"conditioner.embedders.0.transformer.text_model.{key}": shape for key, shape in CLIP_KEYS.items()},
        **{TEXT["xl"] + key: shape for key, shape in OPEN_CLIP_KEYS.items()},
    },
}
# Of the published files, without position numbers, logit scale, schedules and what SD 2 does not use.
COUNTS = {"sd1": (686, 248, 196), "sd2": (686, 248, 23 * 12 + 4), "xl": (1680, 248, 196 + 32 * 12 + 5)}


@pytest.mark.parametrize("kind", KINDS)
def test_real_models_get_the_names_and_shapes_of_the_published_files(kind):
    classes = {"unet": UNet2DConditionModel.from_config, "vae": AutoencoderKL.from_config}
    with torch.device("meta"):
        modules = {
            part: ENCODERS[part](CLIPTextConfig(**config)) if part in ENCODERS else classes[part](config)
            for part, config in REAL[kind].items()
        }
    parts = {part: module.state_dict() for part, module in modules.items()}
    state = to_original(kind, REAL[kind], parts)
    assert kind_of(state) == kind
    begins = [sum(key.startswith(start) for key in state) for start in (DENOISER, AUTOENCODER, "cond")]
    assert tuple(begins) == COUNTS[kind]
    assert len(state) == sum(COUNTS[kind])
    expected = {DENOISER + key: shape for key, shape in (UNET_KEYS | BY_KIND[kind]).items()}
    expected |= {AUTOENCODER + key: shape for key, shape in VAE_KEYS.items()} | TEXT_KEYS[kind]
    assert {key: tuple(state[key].shape) if key in state else None for key in expected} == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_denoisers_modules_have_the_names_of_its_keys(kind):
    unet = tiny_modules(kind)["unet"]
    names = unet_names(unet)
    paths = {key.rpartition(".")[0] for key in unet.state_dict()}
    assert paths <= names.keys()
    assert len({names[path] for path in paths}) == len(paths)
    known = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_2": "time_embed.2",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0": (
            "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0"
        ),
        "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
        "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
        "up_blocks.0.resnets.0.conv1": "output_blocks.0.0.in_layers.2",
        "up_blocks.0.upsamplers.0.conv": f"output_blocks.2.{2 if kind == 'xl' else 1}.conv",
        "conv_out": "out.2",
    }
    assert {path: names[path] for path in known} == known
    assert names["add_embedding.linear_1"] == "label_emb.0.0"


# ---- what the values become


@pytest.mark.parametrize("pipeline", ["sd2", "xl"], indirect=True)
def test_queries_keys_and_values_are_stacked_in_this_order(pipeline):
    kind, _, configs, parts = pipeline
    encoder = parts["text_encoder_2" if kind == "xl" else "text_encoder"]
    state = to_original(kind, configs, parts)
    start = "text_model." if kind == "xl" else ""
    for leaf in ("weight", "bias"):
        own = [encoder[f"{start}encoder.layers.1.self_attn.{one}_proj.{leaf}"] for one in "qkv"]
        assert torch.equal(state[f"{TEXT[kind]}transformer.resblocks.1.attn.in_proj_{leaf}"], torch.cat(own))
    if kind == "xl":
        assert torch.equal(state[TEXT["xl"] + "text_projection"], encoder["text_projection.weight"].T)


# ---- what is left out, and what does not fit


LEFT_OUT = {
    "sd1": {
        *("betas", "alphas_cumprod", "posterior_mean_coef2", "model_ema.decay", "model_ema.diffusion_modelout2weight"),
        TEXT["sd1"] + "embeddings.position_ids",
    },
    "sd2": {
        "sqrt_one_minus_alphas_cumprod",
        *(TEXT["sd2"] + name for name in ("logit_scale", "text_projection", "attn_mask")),
        TEXT["sd2"] + "transformer.resblocks.3.attn.in_proj_weight",
    },
    "xl": {
        *("denoiser.sigmas", TEXT["xl"] + "logit_scale", "conditioner.embedders.0.logit_scale"),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
    },
}


def test_old_files_have_more_than_a_folder_holds(pipeline):
    kind, _, configs, parts = pipeline
    state = to_original(kind, configs, parts)
    more = {key: torch.zeros(3) for key in LEFT_OUT[kind]}
    assert not more.keys() & state.keys()
    assert differences(from_original(kind, configs, state | more), parts) == []


@pytest.mark.parametrize(
    "key",
    [
        "nonsense",
        DENOISER + "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight",
        AUTOENCODER + "loss.logvar",
        TEXT["sd1"] + "encoder.layers.3.layer_norm1.weight",
        TEXT["sd2"] + "ln_final.bias",
    ],
)
def test_a_key_too_many_is_named(small, key):
    configs, _, state = small
    with pytest.raises(ModelError, match="fits nothing") as caught:
        from_original("sd1", configs, state | {key: torch.zeros(1)})
    assert key in str(caught.value)


@pytest.mark.parametrize("pipeline", ["sd2"], indirect=True)
def test_no_layer_but_the_last_may_be_too_many(pipeline):
    kind, _, configs, parts = pipeline
    state = to_original(kind, configs, parts)
    key = TEXT["sd2"] + "transformer.resblocks.4.ln_1.weight"
    with pytest.raises(ModelError, match="fits nothing"):
        from_original(kind, configs, state | {key: torch.zeros(32)})


@pytest.mark.parametrize(
    "key", [DENOISER + "out.2.bias", AUTOENCODER + "encoder.mid.attn_1.k.weight", TEXT["sd1"] + "final_layer_norm.bias"]
)
def test_a_missing_or_misshapen_key_is_named(small, key):
    configs, _, state = small
    less = {name: tensor for name, tensor in state.items() if name != key}
    with pytest.raises(ModelError, match="the file lacks the weight") as caught:
        from_original("sd1", configs, less)
    assert key in str(caught.value)
    with pytest.raises(ModelError, match=r"of shape \[7, 2\]") as caught:
        from_original("sd1", configs, state | {key: torch.zeros(7, 2)})
    assert key in str(caught.value)


def test_parts_that_do_not_fit_the_configs_are_named(small):
    configs, parts, _ = small
    unet = parts["unet"]
    with pytest.raises(ModelError, match=r"lacks the weight vae\."):
        to_original("sd1", configs, {name: state for name, state in parts.items() if name != "vae"})
    with pytest.raises(ModelError, match=r"fits nothing: unet\.more\.weight"):
        to_original("sd1", configs, parts | {"unet": unet | {"more.weight": torch.zeros(1)}})
    with pytest.raises(ModelError, match=r"unet\.conv_in\.bias of shape \[3\], not \[16\]"):
        to_original("sd1", configs, parts | {"unet": unet | {"conv_in.bias": torch.zeros(3)}})


def test_configs_of_other_models_are_refused(small):
    configs, parts, state = small
    with pytest.raises(ModelError, match="the unet that the config describes"):
        from_original("sd1", configs | {"unet": {"down_block_types": ["NoSuchBlock2D"]}}, state)
    with pytest.raises(ModelError, match=r"no place for unet\.class_embedding"):
        to_original("sd1", configs | {"unet": configs["unet"] | {"num_class_embeds": 5}}, parts)
    attends = {"down_block_types": ["AttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]}
    with pytest.raises(ModelError, match=r"no place for unet\.down_blocks\.0\.attentions"):
        to_original("sd1", configs | {"unet": configs["unet"] | attends}, parts)
