"""What a run makes in the end: a whole pipeline, or a folder with a LoRA or an embedding; both with a model card.

A folder is written beside its place, synced and renamed: nobody ever sees half of one.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors import SafetensorError

from dbcap.errors import DbcapError
from dbcap.files import sync_folder, sync_tree
from dbcap.models import folders
from dbcap.models.families.description import Description
from dbcap.models.folders import write_json
from dbcap.models.identity import HEADER, Identity
from dbcap.models.pipelines import IDENTITY
from dbcap.models.tensors import save_file

if TYPE_CHECKING:
    from dbcap.models.hub import LocalModel

CARD = "README.md"
State = Mapping[str, torch.Tensor]


def adapter_file(identity: Identity) -> str:
    """Return the name of a file with an embedding, whose word stands in angle brackets; else that of a LoRA."""
    word = identity.identifier or ""
    return f"{word[1:-1]}.safetensors" if word.startswith("<") and word.endswith(">") else "lora.safetensors"


def write_full(
    local: LocalModel,
    family: Description,
    weights: Mapping[str, State],
    folder: Path,
    identity: Identity,
    card: str,
) -> None:
    """Write a pipeline in diffusers' layout, and replace by it what stands at `folder`.

    `weights` are those of the parts that were trained, by their names, and become float32. All else is as the model
    `local`, which `family` describes, has it, number for number, out of one file too; but configs that name a format of
    numbers name float32. Raises DbcapError where it cannot be written.
    """
    with _replacing(folder) as new:
        folders.write(local, family.config, weights, new, identity)
        (new / CARD).write_text(card, "utf-8")


def write_adapter(
    path: Path, tensors: State, header: Mapping[str, str], identity: Identity, base: Mapping[str, str], card: str
) -> None:
    """Write the folder of `path`, with one file of tensors, as float32, and replace by it what stands there.

    `header` goes into the file beside the identity; `base` is the `model` that was trained, and its `revision`.
    Raises DbcapError where it cannot be written.
    """
    with _replacing(path.parent) as new:
        said = {"format": "pt", **header, HEADER: json.dumps(identity.document(), ensure_ascii=False)}
        save_file({name: one.float() for name, one in tensors.items()}, new / path.name, said)
        write_json(new / IDENTITY, {**identity.document(), "base": dict(base)})
        (new / CARD).write_text(card, "utf-8")


# ---- files


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of `folder` when the block ends well, and vanishes when it does not."""
    new, old = (folder.with_name(f".{folder.name}.{kind}.tmp") for kind in ("new", "old"))
    try:
        _tidy(folder, new, old)
        new.mkdir(parents=True)
        yield new
        sync_tree(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk in its own way
        why = getattr(error, "strerror", None) or error
        raise DbcapError(
            f"cannot write {folder}: {why}", "make room there; the checkpoints are as they were"
        ) from error
    finally:
        _tidy(folder, new, old)


def _tidy(folder: Path, new: Path, old: Path) -> None:
    """Remove what we, or one who was killed, left; the old folder goes back if it has not been replaced."""
    if old.exists() and not folder.exists():
        old.rename(folder)
    for one in (new, old):
        shutil.rmtree(one, ignore_errors=True)


# ---- the card

_METHODS = {
    "full": "DreamBooth (https://arxiv.org/abs/2208.12242)",
    "lora": "DreamBooth (https://arxiv.org/abs/2208.12242) with LoRA (https://arxiv.org/abs/2106.09685)",
    "embedding": "textual inversion (https://arxiv.org/abs/2208.01618)",
}
_TAGS = {"full": ["dreambooth"], "lora": ["dreambooth", "lora"], "embedding": ["textual_inversion"]}
_SETTINGS = {
    "size": "width and height",
    "lr": "learning rate",
    "lr_schedule": "schedule",
    "warmup": "steps of warm-up",
    "batch_size": "photos a batch",
    "accumulate": "batches a step",
    "optimizer": "optimizer",
    "weight_decay": "decay of the weights",
    "clip": "longest gradient",
    "train_text_encoder": "text encoder trained",
    "rank": "LoRA's rank",
    "alpha": "LoRA's alpha",
    "targets": "LoRA's targets",
    "prior": "prior",
    "prior_weight": "weight of the prior",
    "min_snr": "min-SNR",
    "offset_noise": "offset noise",
    "flip": "mirrored as well",
    "ema": "moving average",
    "precision": "precision",
    "seed": "seed",
}
"""Setting -> what the card calls it."""
_ONLY_OF = {"rank": "lora", "alpha": "lora", "targets": "lora"}


def card(manifest: Mapping[str, Any]) -> str:
    """Return the model card of a run, by what its run.json says: Markdown with the head that the hub reads."""
    method, base = manifest["method"], manifest["base"]
    identity = Identity(manifest["identifier"], manifest["class"])
    prompt = manifest["config"]["template"] if identity.class_word else "a photo of [V]"
    words = prompt.replace("[V]", identity.identifier or "").replace("{class}", identity.class_word or "")
    head: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["dbcap", "text-to-image", *_TAGS[method]],
        "instance_prompt": words,
    }
    if repo := _repository(base["model"]):
        head |= {"base_model": repo, "base_model_relation": "finetune" if method == "full" else "adapter"}
    stands = f"`[V]` stands for `{identity.identifier}`, the subject"
    if identity.class_word:
        stands += f", and `{{class}}` for `{identity.class_word}`, what kind of thing that is"
    lines = [
        *("---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=1000).rstrip(), "---", ""),
        *(f"# {manifest['name']}", ""),
        *(f"`dbcap train` made it of `{base['model']}`, by {_METHODS[method]}. In prompts {stands}.", ""),
        *("## How to use it", "", "In this folder:", ""),
        *("```sh", _command(method, base, identity, prompt), "```", "", "With diffusers:", ""),
        *("```python", *_program(method, base, identity, words), "```", ""),
        *("## How it was trained", "", "| | |", "|---|---|"),
        *(f"| {name} | {value} |" for name, value in _facts(manifest).items()),
    ]
    return "\n".join(lines) + "\n"


def _repository(model: str) -> str:
    """Return the name on the hub of what `--model` took, without its revision; of anything else nothing."""
    return "" if Path(model).is_absolute() or "/" not in model else model.partition("@")[0]


def _command(method: str, base: Mapping[str, Any], identity: Identity, prompt: str) -> str:
    words = ["dbcap", "generate", prompt]
    if method == "full":
        return shlex.join([*words, "--model", "."])
    repo = _repository(base["model"])
    words += ["--model", f"{repo}@{base['revision']}" if repo else base["model"]]
    if base.get("base"):
        words += ["--base", base["base"]]
    return shlex.join([*words, f"--{method}", adapter_file(identity)])


def _program(method: str, base: Mapping[str, Any], identity: Identity, words: str) -> list[str]:
    model, repo = base["model"], _repository(base["model"])
    arguments = "FOLDER", f"  # of {model}, in diffusers' layout"
    if method == "full" or (Path(model).is_absolute() and not model.endswith(".safetensors")):
        arguments = json.dumps("." if method == "full" else model), ""
    elif repo:
        arguments = f"{json.dumps(repo)}, revision={json.dumps(base['revision'])}", ""
    load = {"lora": "load_lora_weights", "embedding": "load_textual_inversion"}.get(method)
    return [
        "from diffusers import DiffusionPipeline",
        "",
        "pipeline = DiffusionPipeline.from_pretrained({}){}".format(*arguments),
        *([f"pipeline.{load}({json.dumps(adapter_file(identity))})"] if load else []),
        f'pipeline({json.dumps(words, ensure_ascii=False)}).images[0].save("image.png")',
    ]


def _facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the rows of the table."""
    method, data, best = manifest["method"], manifest["data"], manifest["best"]
    found: dict[str, Any] = {
        "base model": f"`{manifest['base']['model']}`, {manifest['base']['revision']}",
        "photos": len(data["photos"]),
        "images of the class": len(data["class_images"]),
        "steps": manifest["step"],
    }
    for name, called in _SETTINGS.items():
        if _ONLY_OF.get(name, method) == method:
            found[called] = manifest["config"][name]
    if best:
        found["best validation"] = f"{best['value']:.4g} at step {best['step']}"
    found |= manifest["host"]["versions"]
    return {name: _shown(value) for name, value in found.items() if value is not None}


def _shown(value: Any) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)
