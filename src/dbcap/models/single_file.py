"""One `.safetensors` file with a whole Stable Diffusion model, as A1111's web UI and ComfyUI read them.

Such a file has weights under their original names and neither configs nor tokenizers. They come from `--base`, from the
file's header, where dbcap wrote it, or from the hub's cache, where a model of the kind is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dbcap.errors import ModelError, UsageError
from dbcap.models import pipelines, remote

FILES = "dbcap.files"
"""The key in a header that holds configs and tokenizers: a JSON object, path in a pipeline's folder -> text."""
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP = "transformer.text_model."
TEXTS = {
    "sd1": {"text_encoder": "cond_stage_model." + CLIP},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "xl": {"text_encoder": "conditioner.embedders.0." + CLIP, "text_encoder_2": "conditioner.embedders.1.model."},
}
"""Kind -> text encoder -> what its keys begin with."""
_FIRST = UNET + "input_blocks.0.0.weight"
NAMES = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "xl": "Stable Diffusion XL"}
BASES = {
    "sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2": "stabilityai/stable-diffusion-2-1",
    "xl": "stabilityai/stable-diffusion-xl-base-1.0",
}
"""Kind -> the model on the hub whose configs and tokenizers are those of the kind."""


@dataclass(frozen=True)
class SingleFile:
    """What the header of a file tells."""

    path: Path
    kind: str
    """"sd1", "sd2" or "xl"."""
    in_channels: int
    """Of the denoiser: 9 where it inpaints."""
    files: dict[str, str]
    """Configs and tokenizers, if dbcap wrote them."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a pipeline that it holds."""
        return ("unet", "vae", *TEXTS[self.kind])


def kind_of(keys: Collection[str]) -> str | None:
    """Return "sd1", "sd2" or "xl" for the keys of an original file that has a denoiser and text encoders; else None."""
    if not _any(keys, UNET):
        return None
    fits = [kind for kind, texts in TEXTS.items() if all(_any(keys, start) for start in texts.values())]
    return fits[0] if fits else None


def _any(keys: Collection[str], start: str) -> bool:
    return any(key.startswith(start) for key in keys)


def read(path: Path) -> SingleFile:
    """Read a file's header. Raises ModelError for one that is damaged or holds something else."""
    try:
        with safe_open(path, "numpy") as file:
            keys, metadata = set(file.keys()), file.metadata() or {}
            first: list[int] = file.get_slice(_FIRST).get_shape() if _FIRST in keys else []
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "fetch or copy it again") from error
    kind = kind_of(keys)
    if kind is None or len(first) != 4 or not _any(keys, VAE):
        raise ModelError(
            f"{path} is no whole Stable Diffusion model: denoiser, autoencoder and text encoders in one file",
            "a LoRA goes to --lora, an embedding to --embedding; other parts need a folder",
        )
    return SingleFile(path, kind, first[1], _files_in(metadata.get(FILES, "{}"), path))


def _files_in(document: str, path: Path) -> dict[str, str]:
    try:
        files = json.loads(document)
        sound = all(isinstance(text, str) for text in files.values())
    except (ValueError, AttributeError):
        sound = False
    if not sound:
        raise ModelError(f"the configs in the header of {path} are damaged", "give --base FOLDER")
    return {name: files[name] for name in pipelines.small(files)}  # known names lead nowhere else


def folder_of(found: SingleFile, base: str | None, cache: Path) -> Path:
    """Return a folder with configs and tokenizers for a file. Raises UsageError or ModelError where there is none."""
    if base is not None:
        folder = Path(os.path.expanduser(base))
        if not folder.is_dir():
            raise UsageError(f"--base: there is no folder {base}", "it is one of a model in diffusers' layout")
        if not pipelines.describes(folder, found.parts):
            lacks = f"--base {base} lacks a config or tokenizer of {NAMES[found.kind]}"
            raise ModelError(lacks, "choose the folder of such a model")
        return folder.absolute()
    if found.files:
        return _unpacked(found.files, cache / "headers")
    repo = BASES[found.kind]
    commit = remote.cached_commit(repo, "main")
    snapshot = remote.snapshot_folder(repo, commit) if commit else None
    if snapshot is not None and snapshot.is_dir() and pipelines.describes(snapshot, found.parts):
        return snapshot
    raise ModelError(
        f"{found.path} is a {NAMES[found.kind]} file without configs and tokenizers, and {repo} is not in the cache",
        f"give --base FOLDER of such a model, or `dbcap models pull {repo}`",
    )


def _unpacked(files: dict[str, str], cache: Path) -> Path:
    """Write files of a header into the cache, once."""
    document = json.dumps(files, sort_keys=True).encode()
    target = cache / hashlib.sha256(document).hexdigest()
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, suffix=".tmp") as name:
            for path, text in files.items():
                place = Path(name) / "model" / path
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(text, "utf-8")
            if not target.is_dir():
                shutil.move(Path(name) / "model", target)
    except OSError as error:
        raise ModelError(f"cannot write {cache}: {error.strerror or error}", "make room there") from error
    return target
