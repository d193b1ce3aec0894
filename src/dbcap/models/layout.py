"""Which files of a model are read: the small ones that a loader asks for, and one set of weights."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dbcap.errors import ModelError

Kind = Literal["captioner", "diffusion", "unknown"]

CONFIG = "config.json"
PIPELINE = "model_index.json"
CAPTIONER_TYPES = ("vision-encoder-decoder", "blip", "git")

_SMALL = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_TOKENIZER = "tokenizer.json"
_VOCABULARIES = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
_WEIGHTS = (
    # file or index, pattern of the shards; the first that is there is taken, as transformers does
    ("model.safetensors", ""),
    ("model.safetensors.index.json", r"model-\d+-of-\d+\.safetensors"),
    ("pytorch_model.bin", ""),
    ("pytorch_model.bin.index.json", r"pytorch_model-\d+-of-\d+\.bin"),
)
BNB_STATE = ".quant_state.bitsandbytes__"
"""Follows the name of a weight in that of the state which bitsandbytes keeps of it where it packs it in 4 bits."""
BNB_OF_8 = ("SCB", "weight_format")
"""What it keeps of a layer where it packs the weight in 8 bits."""
_FOREIGN = (".safetensors", ".bin", ".h5", ".msgpack", ".onnx", ".ckpt", ".pt", ".pth", ".ot", ".gguf")


class Files(ABC):
    """The files that are read of a model of any kind, by their paths inside it."""

    small: tuple[str, ...]
    """Configuration and tokenizers, what tells the kind of model first."""

    @property
    @abstractmethod
    def sets(self) -> tuple[tuple[str, ...], ...]:
        """The weights of each part of the model: one file, or an index and its shards."""

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether all is there that no loader of ours does without."""

    @property
    def names(self) -> tuple[str, ...]:
        """All of them; the weights come last, so that where they are, everything is."""
        return self.small + tuple(name for files in self.sets for name in files)

    @property
    def pickled(self) -> tuple[tuple[str, ...], ...]:
        """Those of `sets` that are pickled."""
        return tuple(files for files in self.sets if is_pickled(files[0]))


@dataclass(frozen=True)
class Choice(Files):
    """The files of a captioner that are read."""

    small: tuple[str, ...]
    weights: tuple[str, ...]
    """One file, or an index and its shards."""

    @property
    def sets(self) -> tuple[tuple[str, ...], ...]:
        """The one set of weights."""
        return (self.weights,)

    @property
    def complete(self) -> bool:
        """Whether a processor's configuration and a vocabulary are among them; no loader of ours does without."""
        vocabulary = {_TOKENIZER, *_VOCABULARIES} - {"merges.txt"}
        return not vocabulary.isdisjoint(self.small) and any("processor_config" in name for name in self.small)

    @property
    def index(self) -> str:
        """The index of sharded weights, or an empty string."""
        return self.weights[0] if is_index(self.weights[0]) else ""


def choose(names: Collection[str], where: str) -> Choice:
    """Return which of a captioner's files are read. Raises `ModelError`, naming `where`, without config or weights."""
    if CONFIG not in names:
        if PIPELINE in names:
            raise ModelError(f"{where} is a diffusion pipeline, no captioner", "choose another --model")
        raise ModelError(f"{where} has no {CONFIG}", "it does not hold a model that transformers can load")
    small = small_of(names)
    for name, shards in _WEIGHTS:
        if name in names:
            parts = sorted(part for part in names if shards and re.fullmatch(shards, part))
            return Choice(small, (name, *parts))
    others = sorted(name for name in names if name.endswith(_FOREIGN))
    raise ModelError(
        f"{where} has no weights that dbcap reads (model.safetensors or pytorch_model.bin)",
        f"there is only {', '.join(others[:3])}" if others else "choose another --model or --revision",
    )


def small_of(names: Collection[str]) -> tuple[str, ...]:
    """Return a captioner's configuration and tokenizer among these files."""
    vocabulary = (_TOKENIZER,) if _TOKENIZER in names else _VOCABULARIES
    return tuple(name for name in (CONFIG, *_SMALL, *vocabulary) if name in names)


def has_weights(names: Collection[str]) -> bool:
    """Return whether weights that transformers reads are among these files."""
    return any(name in names for name, _ in _WEIGHTS)


def refuse_pickle(choice: Files, where: str, allow_pickle: bool) -> None:
    """Raise `ModelError` if chosen weights are pickled and that is not allowed."""
    if choice.pickled and not allow_pickle:
        name = choice.pickled[0][0]
        raise ModelError(
            f"{where} has weights in a pickled file only ({name}), which allow_pickle = false refuses",
            "allow them, or choose a model with safetensors",
        )


def choose_in(folder: Path, where: str) -> Choice:
    """Return which files of `folder` are read; for sharded weights exactly those that their index names."""
    choice = choose(file_names(folder), where)
    if not choice.index:
        return choice
    parts = shards(folder / choice.index)
    for part in parts:
        if not (folder / part).is_file():
            raise ModelError(f"{where} has no {part}, which {choice.index} names", "fetch or copy the model again")
    return Choice(choice.small, (choice.index, *parts))


def is_index(name: str) -> bool:
    """Return whether the file of this name says which shard has which weight: `*.index.json`, `*.index.fp16.json`."""
    return ".index." in name


def is_pickled(name: str) -> bool:
    """Return whether weights are pickled, by the name of their file or index."""
    return name.endswith((".bin", ".bin.index.json"))


def shards(index: Path) -> tuple[str, ...]:
    """Return the shards that an index names, sorted. Raises `ModelError` if it is no index."""
    try:
        parts = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is damaged: it holds no weight_map", "fetch or copy the model again") from error
    for part in parts:
        if not isinstance(part, str) or Path(part).name != part:  # it must not lead out of the folder
            raise ModelError(f"{index} names a file that cannot be a shard: {part!r}", "fetch or copy the model again")
    return tuple(parts)


def bnb_packed(names: Iterable[str]) -> set[str]:
    """Return the names of weights that bitsandbytes packed in 4 bits, by the names of all tensors."""
    return {name.partition(BNB_STATE)[0] for name in names if BNB_STATE in name}


def count_in(files: Iterable[Path]) -> int:
    """Return the number of weights in safetensors files, from their headers alone. Raises `ModelError` for damage."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for path in files:
        try:
            with safe_open(path, "numpy") as file:
                total += _count(file)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} is damaged: {error}", "fetch or copy it again") from error
    return total


def _count(file: Any) -> int:
    """Count the weights in an open file; where bitsandbytes packed them, the numbers and not what it keeps of them."""
    names, total = file.keys(), 0
    packed = bnb_packed(names)
    for name in names:
        part = file.get_slice(name)
        numbers = math.prod(part.get_shape())
        owner, _, what = name.rpartition(".")
        if name in packed:
            total += numbers * int(re.sub(r"\D", "", part.get_dtype())) // 4
        elif owner not in packed and what not in BNB_OF_8 and BNB_STATE not in name:
            total += numbers
    return total


def file_names(folder: Path) -> set[str]:
    """Return the names of the files directly in `folder`; links that lead nowhere are left out."""
    return {path.name for path in folder.iterdir() if path.is_file()}


def kind_of(config: Mapping[str, Any] | None, names: Collection[str]) -> Kind:
    """Return what a repository holds, by its `config.json` (None where there is none) and its file names."""
    if PIPELINE in names:
        return "diffusion"
    return "captioner" if config and config.get("model_type") in CAPTIONER_TYPES else "unknown"


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return `config.json` of a folder, or None where there is none. Raises `ModelError` if it is no JSON object."""
    path = folder / CONFIG
    if not path.is_file():
        return None
    return read_object(path)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model. Raises `ModelError` where there is none."""
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except FileNotFoundError as error:
        raise ModelError(f"there is no {path}", "fetch or copy the model again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}", "fetch or copy the model again") from error
    return found
