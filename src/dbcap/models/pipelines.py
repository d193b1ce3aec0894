"""Which files of a diffusers pipeline are read: the small ones of each part, and one set of weights a part."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from dbcap.errors import ModelError
from dbcap.models.exported import EXTERNAL
from dbcap.models.layout import CONFIG, PIPELINE, Files, count_in, is_index, is_pickled, read_object, shards

CHECKER = "safety_checker"
"""The part that looks over finished pictures, where there is one."""
SCHEDULER = "scheduler/scheduler_config.json"
"""What the noise was in training, and the model's own sampler."""
ONNX = "model.onnx"
"""What the graph of an exported part is called, in the part's folder."""
ENCODER, DECODER = "vae_encoder", "vae_decoder"
"""The halves of an autoencoder, which are exported as parts of their own."""
_CHECKER_READS = "feature_extractor/preprocessor_config.json"
_SMALL = {
    "unet": (CONFIG,),
    "vae": (CONFIG,),
    ENCODER: (CONFIG,),
    DECODER: (CONFIG,),
    "text_encoder": (CONFIG,),
    "text_encoder_2": (CONFIG,),
    "scheduler": (SCHEDULER.rpartition("/")[2],),
    "feature_extractor": ("preprocessor_config.json",),
    CHECKER: (CONFIG,),
}
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_VOCABULARY = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
_NEEDED = ("unet", "vae", "text_encoder")
_OPTIONAL = ("text_encoder_2", CHECKER)
_EXPORTED = ("unet", ENCODER, DECODER, "text_encoder")
IDENTITY = "dbcap.json"
"""What a model that dbcap trained says about itself: its identifier and its class word."""

_STEMS = ("diffusion_pytorch_model", "model")
_ENDINGS = (
    "safetensors",
    "safetensors.index.json",
    "fp16.safetensors",
    "safetensors.index.fp16.json",
    "safetensors.fp16.index.json",  # the older name
    "bin",
    "bin.index.json",
)
_PICKLED_STEM = "pytorch_model"


@dataclass(frozen=True)
class PipelineFiles(Files):
    """The files of a pipeline that are read."""

    small: tuple[str, ...]
    weights: dict[str, tuple[str, ...]]
    """Part -> its files; of sharded weights the index comes first."""

    @property
    def sets(self) -> tuple[tuple[str, ...], ...]:
        """The files of each part."""
        return tuple(self.weights.values())

    @property
    def lacks(self) -> str:
        """What is missing first of that which no loader does without, or an empty string.

        That is a configuration for every part and the scheduler, and a vocabulary for every text encoder.
        """
        needed: list[tuple[str, ...]] = [(f"{part}/{CONFIG}",) for part in self.weights]
        needed.append((SCHEDULER,))
        for tokenizer, encoder in zip(_TOKENIZERS, ("text_encoder", "text_encoder_2"), strict=True):
            if encoder in self.weights:
                needed.append((f"{tokenizer}/tokenizer.json", f"{tokenizer}/vocab.json"))
        return next((" or ".join(names) for names in needed if not set(names) & set(self.small)), "")

    @property
    def complete(self) -> bool:
        """Whether it lacks nothing."""
        return not self.lacks


def choose(names: Collection[str], where: str, *, safety: bool = False) -> PipelineFiles:
    """Return which files of a pipeline are read, with `safety` those of its safety checker too.

    Where there are ONNX files and no others, they are chosen. Raises `ModelError`, naming `where`, for what is no
    pipeline, or has no weights for a part.
    """
    _check(names, where)
    if f"unet/{ONNX}" in names and not _weights("unet", names):
        return choose_onnx(names, where)
    weights = {}
    for part in (*_NEEDED, *_OPTIONAL):
        if part == CHECKER and not safety:
            continue
        found = _weights(part, names)
        if found:
            weights[part] = found
        elif part in (*_NEEDED, CHECKER) or f"{part}/{CONFIG}" in names:
            raise ModelError(f"{where} has no weights that dbcap reads for its {part}", "choose another --model")
    if safety and _CHECKER_READS not in names:
        raise ModelError(f"{where} has no {_CHECKER_READS}, which its {CHECKER} needs", "go without --safety")
    return PipelineFiles(small(names, safety=safety), weights)


def choose_onnx(names: Collection[str], where: str) -> PipelineFiles:
    """Return which files of a pipeline are read to run it by its ONNX files; a safety checker is never among them.

    Raises `ModelError`, naming `where`, for what is no pipeline, or has no ONNX file for a part.
    """
    _check(names, where)
    weights = {}
    for part in (*_EXPORTED, "text_encoder_2"):
        file = f"{part}/{ONNX}"
        if file in names:
            weights[part] = (file, *(name for name in (f"{file}{EXTERNAL}",) if name in names))
        elif part in _EXPORTED or f"{part}/{CONFIG}" in names:
            what = f"file for its {part}" if f"unet/{ONNX}" in names else "files"
            raise ModelError(f"{where} has no ONNX {what}", f"`dbcap export {where} --onnx` makes them")
    return PipelineFiles(small(names, exported=True), weights)


def _check(names: Collection[str], where: str) -> None:
    if PIPELINE not in names:
        what = "is a captioner, no diffusion pipeline" if CONFIG in names else f"has no {PIPELINE}"
        raise ModelError(f"{where} {what}", "choose another --model")


def small(names: Collection[str], *, safety: bool = False, exported: bool = False) -> tuple[str, ...]:
    """Return those of the names that are configs or tokenizers; the one that tells the kind of pipeline first."""
    found = [name for name in (PIPELINE, IDENTITY) if name in names]
    left_out = [*(() if safety else ("feature_extractor", CHECKER)), *(("vae",) if exported else (ENCODER, DECODER))]
    for part, files in _SMALL.items():
        if part not in left_out:
            found += [f"{part}/{file}" for file in files if f"{part}/{file}" in names]
    for part in _TOKENIZERS:
        vocabulary = ("tokenizer.json", *_VOCABULARY)
        found += [f"{part}/{file}" for file in vocabulary if f"{part}/{file}" in names]
    return tuple(found)


def weights_of(part: str) -> str:
    """Return where diffusers writes the weights of a part."""
    return f"{part}/{'diffusion_pytorch_model' if part in ('unet', 'vae') else 'model'}.safetensors"


def describes(folder: Path, parts: Collection[str]) -> bool:
    """Return whether a folder has the configs and tokenizers of these parts, whatever weights it has."""
    names = small_in(folder)
    return PIPELINE in names and PipelineFiles(names, dict.fromkeys(parts, ())).complete


def small_in(folder: Path) -> tuple[str, ...]:
    """Return the configs and tokenizers in a folder."""
    return small(_names_in(folder))


def _names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.glob("**/*") if path.is_file()}


def _weights(part: str, names: Collection[str]) -> tuple[str, ...]:
    for ending in _ENDINGS:
        for stem in (*_STEMS, *((_PICKLED_STEM,) if ending.startswith("bin") else ())):
            name = f"{part}/{stem}.{ending}"
            if name not in names:
                continue
            if not is_index(name):
                return (name,)
            kind, number = ending.partition(".")[0], r"-\d+-of-\d+"
            # the variant stands before the number, in older files behind it
            numbered = rf"(\.fp16{number}|{number}\.fp16)" if "fp16" in ending else number
            pattern = re.compile(rf"{part}/{stem}{numbered}\.{kind}")
            return (name, *sorted(one for one in names if pattern.fullmatch(one)))
    return ()


def choose_in(folder: Path, where: str, *, safety: bool = False, onnx: bool = False) -> PipelineFiles:
    """Return which files of `folder` are read. With `safety` those of its safety checker too, if it has one.

    With `onnx` its ONNX files. Raises `ModelError` for what `choose` or `choose_onnx` refuses, and where a config, a
    vocabulary or a shard is missing.
    """
    names = _names_in(folder)
    if onnx:
        choice = choose_onnx(names, where)
    else:
        choice = choose(names, where, safety=safety and PIPELINE in names and has_checker(folder))
    if choice.lacks:
        raise ModelError(f"{where} has no {choice.lacks}", "fetch or copy the model again")
    weights = {}
    for part, files in choice.weights.items():
        weights[part] = _indexed(folder, part, files)
        for name in weights[part]:
            if name not in names:
                raise ModelError(f"{where} has no {name}, which {files[0]} names", "fetch or copy the model again")
    return replace(choice, weights=weights)


def _indexed(folder: Path, part: str, files: tuple[str, ...]) -> tuple[str, ...]:
    """Return an index and exactly the shards that it names; a lone file as it is."""
    if not is_index(files[0]):
        return files
    return (files[0], *(f"{part}/{shard}" for shard in shards(folder / files[0])))


def class_name(folder: Path) -> str:
    """Return the class that `model_index.json` names. Raises `ModelError` if it is no JSON object."""
    return str(read_object(folder / PIPELINE).get("_class_name") or "")


def has_checker(folder: Path) -> bool:
    """Return whether `model_index.json` names a safety checker of Stable Diffusion's kind. Raises as `class_name`."""
    named = read_object(folder / PIPELINE).get(CHECKER)
    return isinstance(named, list) and named[-1:] == ["StableDiffusionSafetyChecker"]


def weight_files(part: Path) -> list[Path]:
    """Return the safetensors files in the folder of one part, in no order that matters."""
    found = _weights(part.name, {f"{part.name}/{path.name}" for path in part.iterdir() if path.is_file()})
    if not found or is_pickled(found[0]):
        raise ModelError(f"{part} has no weights in safetensors files", "fetch or copy the model again")
    return [part.parent / name for name in _indexed(part.parent, part.name, found) if not is_index(name)]


def count_parameters(folder: Path) -> int:
    """Return the number of weights of a pipeline. Raises `ModelError` for a damaged file."""
    weights = choose_in(folder, str(folder)).weights.values()
    return count_in(folder / name for files in weights for name in files if not is_index(name))
