"""Loading the parts of a pipeline: whole or not at all, with plain errors, and one copy of the weights in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from dbcap.errors import ModelError
from dbcap.models import bnb
from dbcap.models.libraries import clear_errors
from dbcap.models.mapped import MappedWeights

# How AutoencoderKL named the layers of its attention until 2023; the published weights of SD 1.x and 2.x still do.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


_OF_TEXT_ENCODER = ("embeddings.", "encoder.", "final_layer_norm.")


def published(name: str) -> str:
    """Return how files name a weight or a module of a denoiser or a text encoder.

    transformers has dropped `text_model.` in front of those of CLIP's text encoder, and reads names with and without
    it; all other programs know them with it.
    """
    return f"text_model.{name}" if name.startswith(_OF_TEXT_ENCODER) else name


def diffusers_model(
    kind: Any, config: Mapping[str, Any], weights: MappedWeights, where: str, dtype: torch.dtype
) -> Any:
    """Make a part that diffusers defines, `where` being what to call it. Raises ModelError where it is not whole."""
    with clear_errors(where):
        with torch.device("meta"):
            module = kind.from_config(dict(config))
        state = {_new_name(name): tensor for name, tensor in weights.tensors(dtype).items()}
        expected = module.state_dict()
        _compare(where, expected, state)
        module.load_state_dict({name: state[name].reshape(expected[name].shape) for name in expected}, assign=True)
        return module.eval().requires_grad_(False)


def transformers_model(kind: Any, folder: Path, weights: MappedWeights, where: str, dtype: torch.dtype) -> Any:
    """Make a part that transformers defines, its config in a folder. Raises ModelError where it is not whole."""
    with clear_errors(where):
        module, found = from_weights(kind, folder, weights, dtype)
    if wrong := sorted([*found.missing, *found.misshapen]):
        raise _incomplete(where, wrong)
    return module.requires_grad_(False)


@dataclass(frozen=True)
class Found:
    """What came of matching the names of a file with those of a model."""

    missing: list[str]
    misshapen: list[str]
    unused: list[str]


def from_weights(kind: Any, folder: Path, weights: MappedWeights, dtype: torch.dtype) -> tuple[Any, Found]:
    """Make a model of transformers from the config in a folder and weights: in evaluation mode, and whole or not.

    What bitsandbytes packed is unpacked. Raises ValueError where that cannot be done.
    """
    config = kind.config_class.from_pretrained(folder, local_files_only=True)
    if bnb.is_packed(config):
        del config.quantization_config
        state = bnb.unpacked(weights, dtype, _transposed(kind, config))
    else:
        state = weights.tensors(dtype)
    module, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that it says which; refusing them is the caller's
    )
    misshapen = sorted(name for name, *_ in info["mismatched_keys"])
    return module.eval(), Found(sorted(info["missing_keys"]), misshapen, sorted(info["unexpected_keys"]))


def _transposed(kind: Any, config: Any) -> set[str]:
    """Return the names of matrices that their module has as (inputs, outputs): GPT-2's."""
    with torch.device("meta"):
        module = kind(config)
    return {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, Conv1D)}


def _compare(where: str, expected: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    wrong = [name for name in expected if name not in state or not _fits(state[name], expected[name])]
    if wrong:
        raise _incomplete(where, wrong)


def _fits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether the shapes are equal; what is linear now was once a convolution of 1x1, (C, C, 1, 1)."""
    return tuple(found.shape) in (tuple(expected.shape), (*expected.shape, 1, 1))


def _incomplete(where: str, names: list[str]) -> ModelError:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return ModelError(
        f"{where} lacks the weight {names[0]}{more}, or has it in another shape",
        "the file is incomplete, or belongs to another config.json",
    )


def _new_name(name: str) -> str:
    before, attention, after = name.partition(".attentions.")
    words = after.split(".")
    if attention and len(words) == 3 and words[1] in _OLD_ATTENTION:
        return f"{before}{attention}{words[0]}.{_OLD_ATTENTION[words[1]]}.{words[2]}"
    return name
