"""Pipelines whose weights are pickled become whole ones in safetensors; those in shards of half precision are read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel

from dbcap.cli.app import run as command
from dbcap.config import paths
from dbcap.errors import ModelError
from dbcap.models import parts, pipelines, remote
from dbcap.models.hub import locate
from dbcap.models.mapped import MappedWeights
from dbcap.models.reports import inspect

PAINTER = "org/painter"
UNET = "unet/diffusion_pytorch_model"
OF_TRANSFORMERS = ("text_encoder", "text_encoder_2", "safety_checker")


def paint(text, heard, allow_pickle=True, offline=False):
    given = {"kind": "diffusion", "offline": offline, "allow_pickle": allow_pickle}
    return locate(str(text), **given, events=heard, home=paths.cache_dir())


def refusal(*arguments, **named):
    """Return the one line of the error that this call must raise."""
    with pytest.raises(ModelError) as failure:
        paint(*arguments, **named)
    assert "\n" not in str(failure.value)
    return str(failure.value)


def weights_name(part, ending):
    pickled = "pytorch_model" if ending == "bin" else "model"
    return f"{part}/{pickled if part in OF_TRANSFORMERS else 'diffusion_pytorch_model'}.{ending}"


def pickle_part(folder, part, more=None):
    """Replace the weights of a part by a pickled file."""
    safe = folder / weights_name(part, "safetensors")
    torch.save(load_file(safe) | (more or {}), folder / weights_name(part, "bin"))
    safe.unlink()


def equal(one, other):
    assert one.keys() == other.keys()
    assert all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def conversions():
    return sorted(path.name for path in (paths.cache_dir() / "converted").iterdir() if path.is_dir())


@pytest.fixture
def pickled(home, tiny_diffusion, tmp_path):
    """Return a function that copies a pipeline with these parts pickled."""

    def make(*names, pipeline=tiny_diffusion, name="painter"):
        folder = shutil.copytree(pipeline, tmp_path / name)
        for part in names:
            pickle_part(folder, part)
        return folder

    return make


@pytest.fixture
def served(hub, pickled):
    """A hub with a pipeline whose denoiser is pickled."""
    started = hub()
    shutil.copytree(pickled("unet"), started.repo(PAINTER), dirs_exist_ok=True)
    return started


@pytest.mark.parametrize("xl", [False, True], ids=["sd", "xl"])
def test_a_pickled_pipeline_is_converted_once_and_whole(xl, pickled, heard, tiny_diffusion, tiny_xl):
    pipeline = tiny_xl if xl else tiny_diffusion
    names = ["unet", "vae", "text_encoder", *(["text_encoder_2"] if xl else [])]
    folder = pickled(*names, pipeline=pipeline)
    model = paint(folder, heard)
    assert model.folder.parent == paths.cache_dir() / "converted"
    read = pipelines.choose_in(pipeline, "it").names
    assert {path.relative_to(model.folder).as_posix() for path in model.folder.rglob("*") if path.is_file()} == {*read}
    for part in names:
        name = weights_name(part, "safetensors")
        equal(load_file(model.folder / name), load_file(pipeline / name))
        read = [one for one in read if one != name]
    assert all((model.folder / name).read_bytes() == (pipeline / name).read_bytes() for name in read)
    assert len({path.stat().st_mode for path in model.folder.rglob("*.*") if path.is_file()}) == 1
    (said,) = heard.said
    assert said.startswith(f"converting the pickled {UNET}.bin and {len(names) - 1} more (")
    assert weights_name("vae", "bin") in {file.name for file in model.files}  # as its publisher wrote it
    assert paint(folder, heard) == model
    assert heard.said == [said]
    assert conversions() == [model.folder.name]


def test_it_paints_what_the_one_in_safetensors_paints(pickled, tiny_diffusion, tmp_path, capfd):
    painted = []
    for model in (tiny_diffusion, pickled("unet", "vae", "text_encoder")):
        words = ["a red dog", "--steps", "2", "--dtype", "float32", "--no-progress", "--out", str(tmp_path / "images")]
        assert command(["generate", *words, "--model", str(model)]) == 0
        out, err = capfd.readouterr()
        painted.append(out.strip())
    assert "converting the pickled" in err
    assert painted[0] != painted[1]
    assert Image.open(painted[0]).tobytes() == Image.open(painted[1]).tobytes()


def test_pickled_shards_as_diffusers_writes_them(pickled, heard, tiny_diffusion):
    folder = pickled()
    (folder / f"{UNET}.safetensors").unlink()
    unet = UNet2DConditionModel.from_pretrained(tiny_diffusion / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="300KB", safe_serialization=False)
    assert len(list((folder / "unet").glob("*-of-*.bin"))) > 1
    model = paint(folder, heard)
    equal(load_file(model.folder / f"{UNET}.safetensors"), load_file(tiny_diffusion / f"{UNET}.safetensors"))
    assert not list(model.folder.rglob("*.bin*"))
    assert f"{UNET}.bin.index.json (" in heard.said[0]


def test_shards_in_safetensors_stay_shards(pickled, heard, tiny_diffusion):
    folder = pickled("text_encoder")
    (folder / f"{UNET}.safetensors").unlink()
    unet = UNet2DConditionModel.from_pretrained(tiny_diffusion / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="300KB")
    model = paint(folder, heard)
    files = sorted(path.name for path in (folder / "unet").iterdir())
    assert sorted(path.name for path in (model.folder / "unet").iterdir()) == files
    assert len(pipelines.weight_files(model.folder / "unet")) > 1


def test_what_the_safety_checker_has_is_converted_where_it_is_read(pickled, heard, checked):
    folder = pickled("unet", "safety_checker", pipeline=checked(2))
    given = {"kind": "diffusion", "offline": False, "events": heard, "home": paths.cache_dir()}
    model = locate(str(folder), safety=True, **given)
    name = weights_name("safety_checker", "safetensors")
    equal(load_file(model.folder / name), load_file(checked(2) / name))
    assert (model.folder / "feature_extractor/preprocessor_config.json").is_file()
    assert not (locate(str(folder), **given).folder / "safety_checker").exists()


def test_in_a_part_nothing_is_tied_and_old_buffers_stay(pickled, heard):
    folder = pickled("text_encoder")
    file = folder / "text_encoder/pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    first = next(name for name in state if name.endswith("layers.0.mlp.fc1.weight"))
    state[first.replace("layers.0", "layers.1")] = state[first]
    torch.save(state | {"text_model.embeddings.position_ids": torch.arange(16)[None]}, file)
    model = paint(folder, heard)
    made = load_file(model.folder / "text_encoder/model.safetensors")
    assert torch.equal(made["text_model.embeddings.position_ids"], torch.arange(16)[None])
    assert torch.equal(made[first], made[first.replace("layers.0", "layers.1")])
    weights = MappedWeights([model.folder / "text_encoder/model.safetensors"])
    loaded = parts.transformers_model(CLIPTextModel, model.folder / "text_encoder", weights, "it", torch.float32)
    assert torch.equal(loaded.state_dict()[first], state[first])


def test_the_commands_show_and_pull_it(served, capfd):
    def run(*words):
        code = command(["models", *words, PAINTER, "--kind", "diffusion"])
        return code, *capfd.readouterr()

    code, out, _ = run("show", "--json")
    shown = json.loads(out)
    assert (code, shown["pickled"], shown["problem"], shown["cached"]) == (0, True, "", False)
    assert f"{UNET}.bin" in [file["name"] for file in shown["files"]]
    code, out, err = run("pull", "--no-allow-pickle")
    assert (code, out) == (1, "")
    assert "which allow_pickle = false refuses" in err
    code, out, err = run("pull")
    assert (code, out) == (0, f"{paths.cache_dir() / 'converted' / conversions()[0]}\n")
    assert f"converting the pickled {UNET}.bin (" in err
    code, again, err = run("pull", "--offline")
    assert (code, again) == (0, out)
    assert "converting" not in err
    assert json.loads(run("show", "--json")[1])["cached"] is True


# ---- what was in safetensors already


def test_of_a_hubs_file_there_is_no_second_copy_and_it_outlives_that_cache(served, heard, tiny_diffusion):
    model = paint(PAINTER, heard)
    snapshot = remote.snapshot_folder(PAINTER, model.revision)
    for part in ("vae", "text_encoder"):
        name = weights_name(part, "safetensors")
        assert not (model.folder / name).is_symlink()
        assert (model.folder / name).samefile(snapshot / name)
    assert not (model.folder / "model_index.json").samefile(snapshot / "model_index.json")
    assert paint(PAINTER, heard, offline=True) == model
    shutil.rmtree(remote.cache_folder())
    for name in pipelines.choose_in(tiny_diffusion, "it").names:
        assert (model.folder / name).is_file()
    name = weights_name("vae", "safetensors")
    assert (model.folder / name).read_bytes() == (tiny_diffusion / name).read_bytes()


def test_of_a_users_file_there_is_a_copy_that_does_not_change_with_it(pickled, heard, tiny_diffusion):
    folder = pickled("unet")
    model = paint(folder, heard)
    name = weights_name("vae", "safetensors")
    (folder / name).write_bytes(b"another")  # in place, as `cp` does
    assert (model.folder / name).read_bytes() == (tiny_diffusion / name).read_bytes()


def test_a_cache_on_another_file_system_gets_a_copy(served, heard, tiny_diffusion):
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == Path(remote.cache_folder()).parent.stat().st_dev:
        pytest.skip("there is no second file system")
    home = elsewhere / f"dbcap-{os.getpid()}"
    try:
        model = locate(PAINTER, kind="diffusion", offline=False, events=heard, home=home)
        name = weights_name("vae", "safetensors")
        assert (model.folder / name).stat().st_dev == elsewhere.stat().st_dev
        assert (model.folder / name).read_bytes() == (tiny_diffusion / name).read_bytes()
    finally:
        shutil.rmtree(home, ignore_errors=True)


# ---- what is refused


def test_a_pickled_pipeline_is_refused_where_that_is_not_allowed(served, heard):
    wanted = (
        f" has weights in a pickled file only ({UNET}.bin), which allow_pickle = false refuses; allow them, or choose"
    )
    assert refusal(PAINTER, heard, allow_pickle=False).startswith(f"{PAINTER}{wanted}")
    assert not any(f"{UNET}.bin" in one.path and one.method == "GET" for one in served.requests)
    paint(PAINTER, heard)
    for text, offline in ((PAINTER, False), (PAINTER, True), (served.repo(PAINTER), False)):
        assert wanted in refusal(text, heard, allow_pickle=False, offline=offline)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_code_in_one_part_refuses_the_pipeline(pickled, heard, tmp_path):
    folder = pickled("unet", "vae")
    ran = tmp_path / "ran"
    file = folder / weights_name("vae", "bin")
    torch.save(torch.load(file, weights_only=True) | {"more": Evil(str(ran))}, file)
    assert f"{file} holds code (posix.mkdir) beside weights, and is not read;" in refusal(folder, heard)
    assert not ran.exists()
    assert conversions() == []


@pytest.mark.parametrize("lost", ["vae/config.json", weights_name("vae", "safetensors")])
def test_a_part_that_lacks_something(lost, pickled, heard):
    folder = pickled("unet")
    (folder / lost).unlink()
    wanted = f"has no {lost}" if lost.endswith("config.json") else "has no weights that dbcap reads for its vae"
    assert wanted in refusal(folder, heard)


# ---- interruptions

CONVERT = """
import resource, signal, sys
from pathlib import Path
from dbcap.errors import ModelError
from dbcap.events import Silent
from dbcap.models import pipelines, weights
folder, cache, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
real, written = weights.save_file, []
def save(state, file, metadata):
    if written and how == "stops":
        print("second", flush=True)
        sys.stdin.readline()
    real(state, file, metadata)
    written.append(file)
weights.save_file = save
if how == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    choice = pipelines.choose_in(folder, "it")
    weights.convert(folder, choice, cache=cache, allow_pickle=True, events=Silent())
except ModelError as error:
    print(error)
"""


def test_a_conversion_that_is_killed_leaves_nothing_that_counts(pickled, heard, child):
    folder = pickled("unet", "vae")
    killed = child(CONVERT, folder, paths.cache_dir(), "stops")
    assert killed.stdout.readline() == "second\n"
    killed.kill()
    killed.wait()
    (left,) = conversions()
    assert left.endswith(".tmp")
    assert (paths.cache_dir() / "converted" / left / f"{UNET}.safetensors").is_file()
    model = paint(folder, heard)
    assert conversions() == [model.folder.name]
    assert len(pipelines.choose_in(model.folder, "it").sets) == 3


def test_a_disk_that_is_full_is_one_line(pickled, child):
    out, err = child(CONVERT, pickled("unet"), paths.cache_dir(), "full").communicate()
    assert err == ""
    assert out.startswith(f"cannot convert weights into {paths.cache_dir() / 'converted'}: ")
    assert out.endswith("; make room there, or choose another place with DBCAP_HOME\n")
    assert conversions() == []


# ---- shards of half precision


def half_precision_shards(folder, older):
    """Replace the weights of all parts by shards of half precision, as the libraries write them."""
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    for part, kind in kinds.items():
        module = kind.from_pretrained(folder / part, torch_dtype=torch.float16)
        (folder / weights_name(part, "safetensors")).unlink()
        module.save_pretrained(folder / part, max_shard_size="50KB", variant="fp16")
        (index,) = (folder / part).glob("*.safetensors.index.fp16.json")
        if older:
            content = json.loads(index.read_text())
            for shard in set(content["weight_map"].values()):
                (folder / part / shard).rename(folder / part / _older(shard))
            content["weight_map"] = {name: _older(shard) for name, shard in content["weight_map"].items()}
            index.with_name(index.name.replace("index.fp16", "fp16.index")).write_text(json.dumps(content))
            index.unlink()


def _older(shard):
    """Return model-00001-of-00002.fp16.safetensors for model.fp16-00001-of-00002.safetensors."""
    return shard.replace(".fp16", "").replace(".safetensors", ".fp16.safetensors")


@pytest.mark.parametrize("older", [False, True], ids=["newer names", "older names"])
def test_shards_of_half_precision(older, hub, heard, pickled, tiny_diffusion, family):
    started = hub()
    folder = started.repo(PAINTER)
    shutil.copytree(tiny_diffusion, folder, dirs_exist_ok=True)
    half_precision_shards(folder, older)
    report = inspect(PAINTER, kind="diffusion", offline=False, events=heard, home=paths.cache_dir())
    assert (report.problem, report.pickled) == ("", False)
    assert sum(file.name.startswith("unet/") for file in report.files) > 3
    for text in (PAINTER, str(folder)):
        model = paint(text, heard)
        for part in ("unet", "vae", "text_encoder"):
            files = pipelines.weight_files(model.folder / part)
            assert len(files) > 1
            found = {name: tensor for file in files for name, tensor in load_file(file).items()}
            wanted = load_file(tiny_diffusion / weights_name(part, "safetensors"))
            equal(found, {name: tensor.half() for name, tensor in wanted.items()})
        assert family(model.folder, "float16").unet.dtype == torch.float16
    assert paint(PAINTER, heard, offline=True).revision == started.commit(PAINTER)
    (lost,) = (folder / "unet").glob("*00001-of-*")
    lost.unlink()
    assert f"has no unet/{lost.name}, which {UNET}.safetensors." in refusal(folder, heard)
