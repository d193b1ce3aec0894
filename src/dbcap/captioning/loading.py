"""Loading models of transformers: whole or not at all, with plain errors, and without the library's talk."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from dbcap.captioning.decoding import Decoding
from dbcap.captioning.settings import GENERATION, decoding_defaults, own_lengths
from dbcap.errors import ModelError
from dbcap.models.layout import CONFIG, choose_in
from dbcap.models.libraries import clear_errors
from dbcap.models.mapped import MappedWeights
from dbcap.models.parts import from_weights


@dataclass(frozen=True)
class Loaded:
    """A transformers model."""

    model: Any
    """In evaluation mode."""
    unused: list[str]
    """The weights of the file that it has no place for."""
    weights: MappedWeights
    """The file, of which float32 models keep parts mapped."""
    defaults: dict[str, Any]
    """The model's own decoding settings, by dbcap's names."""


def load_weights(auto_class: Any, folder: Path, model: str, dtype: torch.dtype) -> Loaded:
    """Load the model in a folder. Raises ModelError, which calls it what the user called it."""
    choice = choose_in(folder, model)
    with clear_errors(model):
        weights = MappedWeights([folder / name for name in choice.weights if name != choice.index])
        module, found = from_weights(auto_class, folder, weights, dtype)
        # Without one, transformers takes the settings from config.json, where models of 2022 have them.
        there = (folder / GENERATION).is_file()
        where: dict[str, Any] = {} if there else {"config_file_name": CONFIG, "_from_model_config": True}
        module.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True, **where)
    # The pooler of a ViT encoder is not used for captions, and many checkpoints leave it out.
    missing = [key for key in found.missing if ".pooler." not in key]
    if wrong := [*missing, *found.misshapen]:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        what = "lacks the weight" if missing else "has a weight of another shape than its config says:"
        raise ModelError(
            f"{model} {what} {wrong[0]}{more}", "the file is incomplete, or belongs to another config.json"
        )
    defaults = decoding_defaults(folder, model) if there else own_lengths(module.generation_config.to_diff_dict())
    return Loaded(module, found.unused, weights, defaults)


_OWN_SETTINGS = {
    *(field.name for field in dataclasses.fields(Decoding)),
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "do_sample", "num_return_sequences"),
    *("max_new_tokens", "min_new_tokens", "use_cache", "transformers_version"),
}


def foreign_settings(config: GenerationConfig) -> list[str]:
    """Return the settings of a generation config that change captions and that dbcap's search does not know."""
    about_output = ("_", "output_", "return_dict")
    return [
        name
        for name, value in config.to_diff_dict().items()
        if name not in _OWN_SETTINGS
        and not name.startswith(about_output)
        # 0 and 1 leave everything as it is, but for a token and a switch
        and (value is True or value not in (None, 0, 1, [], {}) or (value is not None and name.endswith("_id")))
    ]
