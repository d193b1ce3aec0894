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
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from dbcap.errors import DbcapError, ModelError
from dbcap.files import sync_folder, sync_tree
from dbcap.models import pipelines
from dbcap.models.families.description import Description
from dbcap.models.families.original import from_original
from dbcap.models.identity import HEADER, Identity
from dbcap.models.layout import CONFIG, PIPELINE, read_object
from dbcap.models.pipelines import CHECKER, IDENTITY
from dbcap.models.single_file import TEXTS, UNET, VAE
from dbcap.training.adapters import published
from dbcap.training.tensors import save_file

if TYPE_CHECKING:
    from dbcap.models.hub import LocalModel

CARD = "README.md"
_PLAIN = {"format": "pt"}
_NONE = [None, None]
"""How model_index.json says that there is no such part."""
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
    choice = _files(local)
    assert weights.keys() <= choice.weights.keys()
    with _replacing(folder) as new:
        for name in choice.small:
            (new / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(local.folder / name, new / name)
        for part in choice.weights:
            path = new / part / _weights_name(part)
            if part in weights:
                _save({published(name): one.float() for name, one in weights[part].items()}, path, _PLAIN)
            elif local.single:
                _save(_unpacked(local, part, family.config(part)), path, _PLAIN)
            else:
                _copy(local.folder / part, path)
            _say_float32(new / part / CONFIG)
        if local.single:
            config = read_object(local.folder / "unet" / CONFIG) | {"in_channels": local.single.in_channels}
            _write_json(new / "unet" / CONFIG, config)
        _write_json(new / PIPELINE, _index(new))
        _write_json(new / IDENTITY, _said(identity))
        (new / CARD).write_text(card, "utf-8")


def write_adapter(
    path: Path, tensors: State, header: Mapping[str, str], identity: Identity, base: Mapping[str, str], card: str
) -> None:
    """Write the folder of `path`, with one file of tensors, as float32, and replace by it what stands there.

    `header` goes into the file beside the identity; `base` is the `model` that was trained, and its `revision`.
    Raises DbcapError where it cannot be written.
    """
    with _replacing(path.parent) as new:
        said = {**_PLAIN, **header, HEADER: json.dumps(_said(identity), ensure_ascii=False)}
        _save({name: one.float() for name, one in tensors.items()}, new / path.name, said)
        _write_json(new / IDENTITY, {**_said(identity), "base": dict(base)})
        (new / CARD).write_text(card, "utf-8")


def _said(identity: Identity) -> dict[str, Any]:
    return {"identifier": identity.identifier, "class": identity.class_word}


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


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _save(state: State, path: Path, header: Mapping[str, str]) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file(state, path, header)


# ---- a pipeline


def _files(local: LocalModel) -> pipelines.PipelineFiles:
    """Return which small files and parts the new pipeline has: a safety checker where it is here."""
    if local.single:
        return pipelines.PipelineFiles(pipelines.small_in(local.folder), dict.fromkeys(local.single.parts, ()))
    try:
        choice = pipelines.choose_in(local.folder, local.spec.text, safety=True)
    except ModelError:  # the hub's cache has one only where it was asked for
        choice = pipelines.choose_in(local.folder, local.spec.text)
    return choice


def _weights_name(part: str) -> str:
    return f"{'diffusion_pytorch_model' if part in ('unet', 'vae') else 'model'}.safetensors"


def _copy(part: Path, path: Path) -> None:
    """Give `path` the weights of a part, whatever their file is called and in how many it is."""
    files = pipelines.weight_files(part)
    if len(files) == 1:
        shutil.copyfile(files[0], path)
    else:
        _save({name: one for file in files for name, one in load_file(file).items()}, path, _PLAIN)


def _unpacked(local: LocalModel, part: str, config: Mapping[str, Any]) -> State:
    """Return the weights of a part that are in one file with all others."""
    assert local.single is not None
    start = {"unet": UNET, "vae": VAE, **TEXTS[local.single.kind]}[part]
    with safe_open(local.single.path, "pt") as file:
        # As it has them: a file of float16 may have an autoencoder of float32.
        state = {key: file.get_tensor(key) for key in file.keys() if key.startswith(start)}  # noqa: SIM118
    found = from_original(local.single.kind, {part: config}, state)[part]
    return found if part == "vae" else {published(name): one for name, one in found.items()}


def _say_float32(path: Path) -> None:
    """Have transformers load a part in float32, as diffusers does its own: by default it takes what the config says."""
    config = read_object(path)
    told = {key: "float32" if key in ("dtype", "torch_dtype") else value for key, value in config.items()}
    if told != config:
        _write_json(path, told)


def _index(folder: Path) -> dict[str, Any]:
    """Return model_index.json without the parts that are not here, which diffusers would look for."""
    index = read_object(folder / PIPELINE)
    for name, value in index.items():
        if isinstance(value, list) and not (folder / name).is_dir():
            index[name] = _NONE
    if index.get(CHECKER) == _NONE:
        index["requires_safety_checker"] = False
    return index


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
