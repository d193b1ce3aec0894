"""A captioner as a bitsandbytes checkpoint: a folder that transformers reads, with the matrices of layers packed."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from dbcap.captioning.captioner import FAMILIES
from dbcap.captioning.loading import load_weights
from dbcap.errors import DbcapError, ModelError
from dbcap.exporting.quantise import LEAST_SHARE, Share
from dbcap.exporting.written import Written
from dbcap.models.hub import LocalModel
from dbcap.models.layout import CONFIG, PIPELINE, choose_in, read_object
from dbcap.models.libraries import clear_errors, quiet_libraries

WEIGHTS = "model.safetensors"
BLOCK_OF_4, OUTPUTS_OF_4 = 64, 32
"""Inputs and outputs of a layer are to be multiples of these, or bitsandbytes' kernels for CPUs stop or go wrong."""


def write(local: LocalModel, folder: Path, bits: int) -> list[Written]:
    """Write a captioner with its weights in 4 bits (NF4, its scales in 8 bits) or 8 (LLM.int8), on the CPU.

    Packed are the matrices of layers, of which the share counts. Tables of words and positions, the output layer and
    convolutions are left, in float16, as bitsandbytes multiplies. Raises DbcapError without bitsandbytes, and
    ModelError for a model that is no captioner or quantised already, or where too little could be quantised.
    """
    name = local.spec.text
    try:
        from bitsandbytes import nn as packed_layers
    except ImportError:
        raise DbcapError(f"--torch-bnb{bits} needs bitsandbytes", "run `pip install 'dbcap[bnb]'`") from None
    kind = _kind_of(local)
    plain = load_weights(kind, local.folder, name, torch.float32).model  # it says what is missing
    left_out = get_keys_to_not_convert(plain)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
        llm_int8_skip_modules=sorted([*left_out, *(_awkward(plain, left_out) if bits == 4 else ())]),
    )
    with clear_errors(name), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of a ViT's pooler, which captions do not need and many files lack
        model = kind.from_pretrained(
            local.folder, quantization_config=config, dtype=torch.float16, device_map={"": "cpu"}, local_files_only=True
        )
    layers, kinds = _layers(model, left_out), (packed_layers.modules.Linear4bit, packed_layers.modules.Linear8bitLt)
    packed = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    share = Share(sum(layers.values()), sum(layers[name] for name in packed))
    if share.of_all < LEAST_SHARE:
        raise ModelError(
            f"{name}: only {share.of_all:.0%} of the weights of its layers could be quantised",
            "they are of a kind that bitsandbytes does not know; export it with --onnx",
        )
    model.generation_config = plain.generation_config
    with quiet_libraries():
        model.save_pretrained(folder)
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # it was made for its owner only
    for file in choose_in(local.folder, name).small:
        if file != CONFIG:
            shutil.copyfile(local.folder / file, folder / file)
    return [Written(WEIGHTS, f"bnb{bits}", share)]


def _kind_of(local: LocalModel) -> Any:
    """Return the class of a captioner. Raises ModelError for anything else."""
    name = local.spec.text
    if local.single or (local.folder / PIPELINE).is_file():
        raise ModelError(f"{name} is a diffusion model", "bitsandbytes checkpoints are made of captioners")
    config = read_object(local.folder / CONFIG)
    if "quantization_config" in config:
        raise ModelError(f"{name} is quantised already", "export the model that it was made of")
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise ModelError(f"{name} is a model of type {kind}", f"dbcap knows {', '.join(FAMILIES)}")
    return FAMILIES[kind].auto_class


def _layers(model: Any, left_out: list[str]) -> dict[str, int]:
    """Return the modules that multiply by a matrix, by name, and how many weights they have."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or isinstance(module, nn.Embedding) or weight.dim() != 2:
            continue
        if should_convert_module(name, left_out):
            sides = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else weight.shape
            found[name] = math.prod(sides)
    return found


def _awkward(model: Any, left_out: list[str]) -> list[str]:
    """Return the layers at whose sides bitsandbytes stops on many CPUs, or none of them if that were too many."""
    layers, found = _layers(model, left_out), []
    for name in layers:
        module = model.get_submodule(name)
        outputs, inputs = module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape
        if inputs % BLOCK_OF_4 or outputs % OUTPUTS_OF_4:
            found.append(name)
    few = sum(layers[name] for name in found) <= (1 - LEAST_SHARE) * sum(layers.values())
    return found if few else []
