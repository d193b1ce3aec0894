"""A diffusion pipeline as a folder of ONNX graphs in Optimum's layout, with what runtimes read beside them."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch

from dbcap.errors import ModelError
from dbcap.exporting import diffusion_graphs, onnx_file, weights_only
from dbcap.exporting.pipelines import opened
from dbcap.exporting.quantise import LEAST_SHARE
from dbcap.exporting.written import Written
from dbcap.models import tensors
from dbcap.models.folders import write_json
from dbcap.models.identity import Identity
from dbcap.models.layout import CONFIG, PIPELINE, read_object
from dbcap.models.libraries import quiet_libraries
from dbcap.models.mapped import trim
from dbcap.models.pipelines import DECODER, ENCODER, IDENTITY, ONNX, SCHEDULER

if TYPE_CHECKING:
    from dbcap.models.families.sd import StableDiffusion
    from dbcap.models.hub import LocalModel

_NOT_EXPORTED = ("feature_extractor", "image_encoder", "safety_checker")
_OLDER = ("vocab.json", "merges.txt")
"""What tokenizers of transformers before its version 5 are read from."""
_NEWER = ["transformers", "TokenizersBackend"]
_EVER = ["transformers", "PreTrainedTokenizerFast"]
"""A class of tokenizers, as version 5 calls it, and as both do."""


def write(local: LocalModel, folder: Path, precision: str) -> list[Written]:
    """Fill an empty folder with the graphs of a pipeline, with what belongs to it merged in, and its small files.

    `precision` is "fp32"; "fp16", where what overflows in it, SDXL's autoencoder, stays float32; or "int8", which the
    weights are, and all else float32. One part is in memory at a time. Raises ModelError for a part that cannot be
    exported, or of which too little could be quantised; UsageError for a LoRA or embedding that does not fit.
    """
    family = opened(local)
    written = []
    for part, config, graph in _graphs(family, half=precision == "fp16"):
        (folder / part).mkdir()
        path = folder / part / ONNX
        share = weights_only.quantise(graph) if precision == "int8" else None
        if share and share.of_all < LEAST_SHARE:
            raise ModelError(
                f"{family.name}: only {share.of_all:.0%} of the weights of {part}/{ONNX} could be quantised",
                "its layers are of a kind that dbcap does not know; export it with --onnx alone",
            )
        onnx_file.save(graph, path)
        write_json(folder / part / CONFIG, config)
        written.append(Written(f"{part}/{ONNX}", precision, share))
        del graph  # before the next one is made
    _write_rest(family, local, folder)
    return written


def _graphs(family: StableDiffusion, half: bool) -> Iterator[tuple[str, dict[str, Any], ir.Model]]:
    """Yield the folder, the config and the graph of each part; what was made before is let go."""
    xl = len(family.text_parts) > 1
    for (_, part, _), tokenizer in zip(family.text_parts, family.tokenizers, strict=True):
        config = family.config(part)
        config["vocab_size"] = max(config.get("vocab_size", 0), len(tokenizer))
        yield (
            part,
            config,
            _graph(family, part, half, lambda model, name: diffusion_graphs.text_encoder(model, xl, name)),
        )
    yield "unet", family.unet_config, _graph(family, "unet", half, diffusion_graphs.unet)
    half = half and not family.vae_config["force_upcast"]
    for part, make in ((ENCODER, diffusion_graphs.vae_encoder), (DECODER, diffusion_graphs.vae_decoder)):
        yield part, family.vae_config, _graph(family, "vae", half, make)


def _graph(family: StableDiffusion, part: str, half: bool, make: Callable[[Any, str], ir.Model]) -> ir.Model:
    gc.collect()  # what the exporter leaves behind holds the weights of the part before
    trim()
    model = family.plain(part, torch.float32)
    if half:
        for name, one in model.named_parameters():
            one.data = tensors.halved(one.data, f"{name} of the {part} of {family.name}")
        model.half()  # buffers too
    return make(model, family.name)


def _write_rest(family: StableDiffusion, local: LocalModel, folder: Path) -> None:
    """Write tokenizers, the scheduler's config and what the folder is."""
    for tokenizer, (name, _, _) in zip(family.tokenizers, family.text_parts, strict=True):
        with quiet_libraries():
            tokenizer.save_pretrained(folder / name)
        _write_older(folder / name)
    (folder / SCHEDULER).parent.mkdir()
    shutil.copyfile(local.folder / SCHEDULER, folder / SCHEDULER)
    index = read_object(local.folder / PIPELINE)
    index |= {name: [None, None] for name in _NOT_EXPORTED if name in index}
    index |= {name: _EVER for name, value in index.items() if value == _NEWER}
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    write_json(folder / PIPELINE, index)
    if (said := family.identity_with([])) != Identity():
        write_json(folder / IDENTITY, said.document())


def _write_older(folder: Path) -> None:
    """Write a tokenizer's vocabulary as files of its own, too, where it is of CLIP's kind."""
    model = read_object(folder / "tokenizer.json").get("model", {})
    if model.get("type") != "BPE" or all((folder / name).is_file() for name in _OLDER):
        return
    vocabulary, merges = (folder / name for name in _OLDER)
    vocabulary.write_text(json.dumps(model["vocab"], ensure_ascii=False), "utf-8")
    lines = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    merges.write_text("\n".join(["#version: 0.2", *lines]) + "\n", "utf-8")
