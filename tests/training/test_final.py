"""What a run makes: folders that diffusers and dbcap read alike, whatever files the base model has, and cards."""

import errno
import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPTextModel

from dbcap.cli.app import run as command
from dbcap.config.training import TrainConfig
from dbcap.errors import DbcapError
from dbcap.models import families, folders, identity, single_file, tensors
from dbcap.models.hub import LocalModel
from dbcap.models.identity import Identity
from dbcap.models.specs import parse
from dbcap.testing.diffusion import write_diffusion
from dbcap.training import adapters, final

QUICK = ["--steps", "3", "--guidance", "2", "--dtype", "float32", "--no-progress"]
REX = Identity("sks", "dog")
CARD = "# A card\n"
KINDS = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
UNET = "unet/diffusion_pytorch_model"


def local(folder, file=None):
    return LocalModel(parse(str(file or folder)), folder, "0" * 64, (), single_file.read(file) if file else None)


def trained(folder, parts=("unet", "text_encoder")):
    """Return weights of parts as a run has them: changed, in the memory format that the denoiser trains in."""
    random = torch.Generator().manual_seed(0)
    found = {}
    for part in parts:
        module = KINDS[part].from_pretrained(folder / part).to(memory_format=torch.channels_last)
        found[part] = {
            name: (one + 0.05 * torch.randn(one.shape, generator=random)).detach()
            for name, one in module.named_parameters()
        }
    return found


def write_full(source, weights, folder, who=REX):
    final.write_full(source, families.describe(source), weights, folder, who, CARD)
    return folder


def picture(pipeline, prompt="a sks dog"):
    """Return what diffusers makes, RGB (1, 32, 32, 3)."""
    pipeline.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "height": 32, "width": 32}
    return pipeline(prompt, generator=random, output_type="np", **settings).images


def generated(*words, capfd):
    """Run `dbcap generate` and return its picture, RGB (32, 32, 3)."""
    code = command(["generate", *words, *QUICK])
    out, err = capfd.readouterr()
    assert code == 0, err
    return np.asarray(Image.open(out.strip()).convert("RGB"))


def as_diffusers(images):
    return (images[0] * 255).round().astype(int)


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- whole pipelines


def test_a_whole_model_is_what_was_trained_to_diffusers_and_to_dbcap(
    tiny_diffusion, home, tmp_path, monkeypatch, capfd
):
    weights = trained(tiny_diffusion)
    folder = write_full(local(tiny_diffusion), weights, tmp_path / "final")
    expected = StableDiffusionPipeline.from_pretrained(tiny_diffusion)
    before = picture(expected)
    for part, state in weights.items():
        getattr(expected, part).load_state_dict(state)
    found = picture(StableDiffusionPipeline.from_pretrained(folder))
    assert (found == picture(expected)).all()
    assert np.abs(found - before).max() > 0.1
    monkeypatch.chdir(tmp_path)
    ours = generated("a [V] {class}", "--model", str(folder), capfd=capfd)
    assert np.abs(ours - as_diffusers(found)).max() <= 1


def test_what_is_in_the_folder(tiny_diffusion, tmp_path):
    weights = trained(tiny_diffusion, ["unet"])
    folder = write_full(local(tiny_diffusion), weights, tmp_path / "final")
    before, after = files_in(tiny_diffusion), files_in(folder)
    assert after.keys() == before.keys() | {"dbcap.json", "README.md"}
    assert {name for name in before if after[name] != before[name]} <= {f"{UNET}.safetensors", "model_index.json"}
    assert json.loads(after["dbcap.json"]) == {"identifier": "sks", "class": "dog"}
    assert identity.of_folder(folder) == REX
    assert after["README.md"] == CARD.encode()
    found = load_file(folder / f"{UNET}.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights["unet"].items())


def halves(folder, as_variant):
    """Make the weights of a pipeline float16, under the names that such files have, or under the plain ones."""
    for path in folder.glob("*/*.safetensors"):
        state = {name: tensor.half() for name, tensor in load_file(path).items()}
        path.unlink()
        save_file(state, path.with_suffix(".fp16.safetensors") if as_variant else path, {"format": "pt"})
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"float16"'))


def shards(folder):
    for part, kind in {**KINDS, "vae": AutoencoderKL}.items():
        module = kind.from_pretrained(folder / part)
        for path in (folder / part).glob("*.safetensors"):
            path.unlink()
        module.save_pretrained(folder / part, max_shard_size="60KB")
        assert len(list((folder / part).glob("*-of-*.safetensors"))) > 1


def published_names(folder):
    """Name the weights of the text encoder as all models on the hub do."""
    path = folder / "text_encoder" / "model.safetensors"
    save_file({f"text_model.{name}": one for name, one in load_file(path).items()}, path, {"format": "pt"})


BASES = {
    "plain": lambda _: None,
    "float16": lambda folder: halves(folder, False),
    "variant": lambda folder: halves(folder, True),
    "shards": shards,
    "published": published_names,
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("part", KINDS)
def test_whatever_the_bases_files_are_like(part, base, tiny_diffusion, tmp_path, family):
    """One part is trained. All others keep their numbers and number format."""
    source = shutil.copytree(tiny_diffusion, tmp_path / "base")
    weights = trained(source, [part])
    BASES[base](source)
    folder = write_full(local(source), weights, tmp_path / "final")
    found, theirs = family(folder), StableDiffusionPipeline.from_pretrained(folder)
    plain = StableDiffusionPipeline.from_pretrained(tiny_diffusion)
    for name in ("unet", "text_encoder", "vae"):
        (path,) = (folder / name).glob("*.safetensors")
        dtype = torch.float16 if base in ("float16", "variant") and name != part else torch.float32
        assert {one.dtype for one in load_file(path).values()} == {dtype}
        expected = weights.get(name) or {
            n: one.to(dtype).float() for n, one in getattr(plain, name).state_dict().items()
        }
        state = getattr(theirs, name).state_dict()
        assert {one.dtype for one in state.values()} == {torch.float32}
        assert all(torch.equal(state[n], one) for n, one in expected.items())
    assert CLIPTextModel.from_pretrained(folder / "text_encoder").dtype == torch.float32
    ours = found.encode("a sks dog", 1, (32, 32)).states
    (wanted,) = theirs.encode_prompt("a sks dog", "cpu", 1, False)[0]
    assert torch.equal(ours, wanted)


def test_a_text_encoder_is_named_as_those_on_the_hub_are(tiny_diffusion, tmp_path):
    weights = trained(tiny_diffusion)
    folder = write_full(local(tiny_diffusion), weights, tmp_path / "final")
    names = load_file(folder / "text_encoder" / "model.safetensors").keys()
    assert names == {f"text_model.{name}" for name in weights["text_encoder"]}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("part", KINDS)
def test_a_base_in_one_file(part, half, tiny_diffusion, family, tmp_path):
    path = tmp_path / "one.safetensors"
    family(tiny_diffusion).write_single_file(path)
    if half:  # as people make them: all but the autoencoder
        state = {name: one if name.startswith("first_stage") else one.half() for name, one in load_file(path).items()}
        with safe_open(path, "pt") as file:
            header = file.metadata()
        save_file(state, path, header)
    weights = trained(tiny_diffusion, [part])
    folder = write_full(local(tiny_diffusion, path), weights, tmp_path / "final")
    theirs, plain = (StableDiffusionPipeline.from_pretrained(one) for one in (folder, tiny_diffusion))
    (other,) = KINDS.keys() - {part}
    state = load_file(next((folder / other).glob("*.safetensors")))
    assert {one.dtype for one in state.values()} == {torch.float16 if half else torch.float32}
    for name in ("unet", "text_encoder", "vae"):
        expected = weights.get(name) or getattr(plain, name).state_dict()
        short = half and name == other
        found = getattr(theirs, name).state_dict()
        assert all(torch.equal(found[n], one.half().float() if short else one) for n, one in expected.items()), name
    assert family(folder).encode("a dog", 1, (32, 32)).states.shape == (16, 32)


def test_a_file_that_inpaints_and_configs_of_a_model_that_does_not(tiny_diffusion, family, tmp_path):
    inpaints, path = write_diffusion(tmp_path / "inpaints", inpaints=True), tmp_path / "one.safetensors"
    family(inpaints).write_single_file(path)
    source = local(tiny_diffusion, path)
    folder = write_full(source, trained(inpaints, ["unet"]), tmp_path / "final")
    assert UNet2DConditionModel.from_pretrained(folder / "unet").config.in_channels == 9
    assert family(folder).inpaints


def test_two_text_encoders(tiny_xl, tmp_path, family):
    weights = trained(tiny_xl)
    folder = write_full(local(tiny_xl), weights, tmp_path / "final")
    theirs = DiffusionPipeline.from_pretrained(folder)
    for part, state in weights.items():
        found = getattr(theirs, part).state_dict()
        assert all(torch.equal(found[name], one) for name, one in state.items())
    assert type(theirs).__name__ == "StableDiffusionXLPipeline"
    assert "requires_safety_checker" not in json.loads((folder / "model_index.json").read_text())
    assert family(folder).encode("a dog", 1, (32, 32)).states.shape == (16, 64)


def test_a_safety_checker_comes_along(checked, tmp_path):
    folder = write_full(local(checked(-2)), trained(checked(-2), ["unet"]), tmp_path / "final")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a dog", num_inference_steps=1).nsfw_content_detected == [True]


@pytest.mark.parametrize("lost", ["safety_checker", "feature_extractor"])
def test_a_safety_checker_that_was_not_fetched_is_not_asked_for(checked, tmp_path, lost):
    """As in the hub's cache, where dbcap fetches one only when it is to be used."""
    source = shutil.copytree(checked(-2), tmp_path / "base")
    shutil.rmtree(source / lost)
    folder = write_full(local(source), trained(source, ["unet"]), tmp_path / "final")
    index = json.loads((folder / "model_index.json").read_text())
    assert (index["safety_checker"], index["requires_safety_checker"]) == ([None, None], False)
    assert StableDiffusionPipeline.from_pretrained(folder).safety_checker is None
    assert not families.describe(local(folder)).has_checker


def test_a_model_that_was_trained_before_has_a_new_word(tiny_diffusion, tmp_path):
    first = write_full(local(tiny_diffusion), trained(tiny_diffusion), tmp_path / "first", Identity("abc", "cat"))
    second = write_full(local(first), trained(first, ["unet"]), tmp_path / "second", Identity("xyz"))
    assert [identity.of_folder(one) for one in (first, second)] == [Identity("abc", "cat"), Identity("xyz", None)]


# ---- whole, or not at all


def test_an_earlier_folder_is_replaced_in_the_end(tiny_diffusion, tmp_path, monkeypatch):
    folder = tmp_path / "run" / "final"
    (folder / "old").mkdir(parents=True)
    seen = []
    save = tensors.save_file
    monkeypatch.setattr(folders, "save_file", lambda *given: (seen.append(list(folder.iterdir())), save(*given)))
    write_full(local(tiny_diffusion), trained(tiny_diffusion), folder)
    assert seen == [[folder / "old"]] * 2
    assert not (folder / "old").exists()
    assert (folder / "model_index.json").exists()
    assert list(folder.parent.iterdir()) == [folder]


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", [(folders, "save_file"), (final, "sync_tree")])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_full_disk_leaves_what_was_there(place, earlier, tiny_diffusion, tmp_path, monkeypatch):
    folder = tmp_path / "run" / "final"
    if earlier:
        write_full(local(tiny_diffusion), trained(tiny_diffusion, ["unet"]), folder, Identity("old"))
    else:
        folder.parent.mkdir()
    before = files_in(folder.parent)
    weights = trained(tiny_diffusion)
    monkeypatch.setattr(*place, full_disk)
    with pytest.raises(DbcapError) as failure:
        write_full(local(tiny_diffusion), weights, folder)
    assert str(failure.value) == (
        f"cannot write {folder}: No space left on device; make room there; the checkpoints are as they were"
    )
    assert files_in(folder.parent) == before


def test_a_rename_that_fails_puts_the_earlier_folder_back(tiny_diffusion, tmp_path, monkeypatch):
    folder = write_full(local(tiny_diffusion), trained(tiny_diffusion, ["unet"]), tmp_path / "run" / "final")
    before, rename = files_in(folder), Path.rename

    def refuse(path, target):
        if ".new." in path.name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(DbcapError, match="Permission denied"):
        write_full(local(tiny_diffusion), trained(tiny_diffusion, ["unet"]), folder, Identity("new"))
    assert files_in(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("left", ["new", "old"])
def test_what_a_killed_run_left_goes(left, tiny_diffusion, tmp_path):
    (tmp_path / f".final.{left}.tmp" / "unet").mkdir(parents=True)
    folder = write_full(local(tiny_diffusion), trained(tiny_diffusion, ["unet"]), tmp_path / "final")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final"]
    assert identity.of_folder(folder) == REX


# ---- LoRA and embeddings


@pytest.fixture
def lora(tiny_diffusion):
    """Tensors and header of a LoRA that does something."""
    unet = UNet2DConditionModel.from_pretrained(tiny_diffusion / "unet")
    adapters.add_lora(unet, "unet", 2, 6.0, "attention", 0)
    with torch.no_grad():
        for one in adapters.lora_parameters(unet).values():
            one += 0.1
    tensors = {f"unet.{name}": one.detach() for name, one in adapters.lora_parameters(unet).items()}
    return tensors, adapters.lora_header({"unet": unet})


@pytest.fixture
def base(tiny_diffusion):
    return {"model": str(tiny_diffusion), "base": None, "revision": "0" * 64}


def test_a_lora_says_whose_it_is(lora, base, tmp_path):
    tensors, header = lora
    path = tmp_path / "final" / "lora.safetensors"
    short = {name: one.to(torch.bfloat16) for name, one in tensors.items()}
    final.write_adapter(path, short, header, REX, base, CARD)
    assert files_in(path.parent).keys() == {"lora.safetensors", "dbcap.json", "README.md"}
    assert identity.of_header(path) == identity.of_folder(path.parent) == REX
    said = json.loads((path.parent / "dbcap.json").read_text())
    assert said == {"identifier": "sks", "class": "dog", "base": base}
    with safe_open(path, "pt") as file:
        assert file.metadata().items() >= header.items()
    assert {one.dtype for one in load_file(path).values()} == {torch.float32}


def test_words_of_any_script_survive(lora, base, tmp_path):
    tensors, header = lora
    who = Identity("ключ", "犬")
    path = tmp_path / "final" / "lora.safetensors"
    final.write_adapter(path, tensors, header, who, base, "# 犬\n")
    assert identity.of_header(path) == identity.of_folder(path.parent) == who
    assert (path.parent / "README.md").read_text("utf-8") == "# 犬\n"


# ---- cards


def manifest(method, base, who=REX):
    config = TrainConfig(data=("photos",), method=method, lr=1e-5, ema=True).model_dump(mode="json")
    return {
        "name": "rex-1",
        "status": "finished",
        "step": 400,
        "steps": 400,
        "method": method,
        "identifier": who.identifier,
        "class": who.class_word,
        "config": config,
        "base": base,
        "data": {"photos": {"1.png": "0" * 64}, "captions": [], "class_images": ["1" * 64] * 3},
        "best": {"step": 300, "value": 0.123456},
        "host": {"cpu": "one", "versions": {"dbcap": "0.1", "torch": "2.13"}},
        "timings": [],
    }


def blocks(text):
    """Return the head, the command and the program of a card."""
    head = yaml.safe_load(text.split("---\n")[1])
    (shell,), (program,) = (re.findall(rf"```{kind}\n(.*?)\n```", text, re.DOTALL) for kind in ("sh", "python"))
    return head, shlex.split(shell), program


HUB = {"model": "org/name@v1", "base": None, "revision": "a" * 40}


@pytest.mark.parametrize(
    ("method", "who", "relation", "tags"),
    [
        ("full", REX, "finetune", ["dreambooth"]),
        ("lora", REX, "adapter", ["dreambooth", "lora"]),
        ("embedding", Identity("<rex-1>", "dog"), "adapter", ["textual_inversion"]),
    ],
)
def test_the_hub_reads_the_head(method, who, relation, tags):
    head, shell, program = blocks(final.card(manifest(method, HUB, who)))
    assert head == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["dbcap", "text-to-image", *tags],
        "instance_prompt": f"a photo of {who.identifier} dog",
        "base_model": "org/name",
        "base_model_relation": relation,
    }
    assert shell[:3] == ["dbcap", "generate", "a photo of [V] {class}"]
    pinned = 'from_pretrained("org/name", revision="' + "a" * 40
    assert (f"org/name@{'a' * 40}" in shell, pinned in program) == (method != "full",) * 2


def test_the_table_says_how_it_was_trained():
    text = final.card(manifest("lora", HUB))
    rows = dict(row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("| ") and row != "| | |")
    wanted = {
        "base model": f"`org/name@v1`, {'a' * 40}",
        "photos": "1",
        "images of the class": "3",
        "steps": "400",
        "learning rate": "1e-05",
        "LoRA's rank": "8",
        "moving average": "yes",
        "best validation": "0.1235 at step 300",
        "torch": "2.13",
    }
    assert rows.items() >= wanted.items()
    assert "None" not in text
    assert "LoRA's rank" not in final.card(manifest("full", HUB))


def test_without_a_class_word_nothing_speaks_of_one():
    head, shell, program = blocks(final.card(manifest("full", HUB, Identity("sks"))))
    assert head["instance_prompt"] == "a photo of sks"
    assert shell[2] == "a photo of [V]"
    assert '"a photo of sks"' in program


@pytest.mark.parametrize("model", ["starter", "run:other", "/models/one.safetensors"])
def test_what_diffusers_cannot_find_is_left_open(model):
    head, shell, program = blocks(final.card(manifest("lora", {"model": model, "base": "/configs", "revision": "0"})))
    assert "base_model" not in head
    assert shell[3:] == ["--model", model, "--base", "/configs", "--lora", "lora.safetensors"]
    assert f"from_pretrained(FOLDER)  # of {model}" in program


def test_a_card_says_what_works(tiny_diffusion, lora, base, home, tmp_path, monkeypatch, capfd):
    """Its command and its program, in each kind of folder."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_diffusion / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(tiny_diffusion / "text_encoder")
    new = adapters.add_word(encoder, tokenizer, "<rex-1>", "dog")
    with torch.no_grad():
        new.vector *= 30
    word, made = Identity("<rex-1>", "dog"), {}
    for method, who in (("full", REX), ("lora", REX), ("embedding", word)):
        folder = tmp_path / method
        card = final.card(manifest(method, base, who))
        if method == "full":
            source = local(tiny_diffusion)
            weights = trained(tiny_diffusion)
            final.write_full(source, families.describe(source), weights, folder, who, card)
        else:
            tensors, header = lora if method == "lora" else ({new.word: new.vector.detach()}, {})
            final.write_adapter(folder / final.adapter_file(who), tensors, header, who, base, card)
        monkeypatch.chdir(folder)
        _, shell, program = blocks((folder / "README.md").read_text())
        ours = generated(*shell[2:], capfd=capfd).astype(int)
        program = program.replace("DiffusionPipeline.from", "StableDiffusionPipeline.from").replace(
            ").images", ", 32, 32, 3, guidance_scale=2, generator=torch.Generator().manual_seed(0)).images"
        )
        Path("program.py").write_text(f"import torch\nfrom diffusers import StableDiffusionPipeline\n{program}\n")
        runpy.run_path("program.py")
        theirs = np.asarray(Image.open("image.png")).astype(int)
        assert np.abs(ours - theirs).max() <= 1, method
        made[method] = ours
    plain = generated("a photo of sks dog", "--model", str(tiny_diffusion), capfd=capfd)
    assert all(np.abs(one - plain).max() > 3 for one in made.values())
