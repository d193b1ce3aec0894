"""`run:NAME` as a model: which folder, which weights, which words, and what is wrong with a run."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dbcap import runs
from dbcap.config.paths import cache_dir
from dbcap.errors import DbcapError, ModelError, UsageError
from dbcap.models import families, trained
from dbcap.models.hub import locate
from dbcap.models.identity import Identity
from dbcap.models.reports import inspect
from dbcap.models.trained import is_gone
from dbcap.testing.diffusion import write_diffusion

LORA = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
WORDS = Identity("sks", "dog")


def find(text, heard, **more):
    how = {"kind": "diffusion", "offline": True, "events": heard, "home": cache_dir()}
    return locate(text, **how | more)


def revision(folder, heard):
    return find(str(folder), heard).revision


def weights(folder, part):
    (path,) = (folder / part).glob("*.safetensors")
    return load_file(path)


def moved(state, by):
    return {name: tensor + by if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def parts_of(local):
    """Return all weights of a model, by part, as its family object has them."""
    model = families.load(local, "cpu", "float32")
    return {
        "unet": model._weights("unet"),
        "vae": model._weights("vae"),
        "text_encoder": model._weights("text_encoder"),
    }


def assert_weights(local, expected):
    for part, opened in parts_of(local).items():
        found = opened.tensors(torch.float32)
        assert found.keys() == expected[part].keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected[part].items())


@pytest.fixture
def base(tiny_diffusion):
    """The weights of the model that runs are trained on, by part."""
    return {part: weights(tiny_diffusion, part) for part in ("unet", "vae", "text_encoder")}


@pytest.fixture
def full(write_run, write_checkpoint, tiny_diffusion, base, heard):
    """A finished run of the method full on a folder, with two checkpoints, one of the denoiser alone."""
    run = write_run(model=str(tiny_diffusion), revision=revision(tiny_diffusion, heard))
    both = {f"weights/{part}.safetensors": moved(base[part], 0.25) for part in ("unet", "text_encoder")}
    write_checkpoint(run, 200, both, best=True)
    write_checkpoint(run, 400, {"weights/unet.safetensors": moved(base["unet"], 0.5)})
    shutil.copytree(tiny_diffusion, run.final)
    (run.final / "dbcap.json").write_text('{"identifier": "sks", "class": "dog"}')
    return run


def adapted(run, folder, method):
    """Give a run a result of one file."""
    run.update(method=method)
    folder.mkdir(parents=True)
    if method == "lora":
        halves = {f"{LORA}.lora_A.weight": torch.ones(2, 64), f"{LORA}.lora_B.weight": torch.ones(64, 2)}
        save_file(halves, folder / "lora.safetensors")
        return folder / "lora.safetensors"
    save_file({"<dog-1>": torch.ones(1, 32)}, folder / "dog-1.safetensors")
    return folder / "dog-1.safetensors"


# ---- the method full


def test_the_final_model_is_its_folder(full, heard):
    found = find("run:dog-1", heard)
    assert (found.folder, found.revision) == (full.final, revision(full.final, heard))
    model = families.describe(found)
    assert (model.address, model.title, model.run, model.step) == ("run:dog-1", "dog-1", "dog-1", 400)
    assert model.identity_with([]) == WORDS
    assert heard.warned == []


@pytest.mark.parametrize("kind", ["last", "400"])
def test_a_checkpoint_is_the_model_before_with_other_parts(full, base, heard, kind, tiny_diffusion):
    found = find(f"run:dog-1@{kind}", heard)
    assert_weights(found, base | {"unet": moved(base["unet"], 0.5)})
    model = families.describe(found)
    assert (model.address, model.title, model.step) == ("run:dog-1@400", "dog-1", 400)
    assert model.identity_with([]) == WORDS
    assert found.folder.parent == cache_dir() / "checkpoints"
    # It stands for the same numbers as a folder of its own with these files.
    copied = full.folder / "copied"
    shutil.copytree(tiny_diffusion, copied)
    shutil.copy(
        full.checkpoints / "000400/weights/unet.safetensors", copied / "unet/diffusion_pytorch_model.safetensors"
    )
    (copied / "dbcap.json").write_text(json.dumps({"identifier": "sks", "class": "dog"}))
    assert revision(copied, heard) == found.revision


@pytest.mark.parametrize("kind", ["best", "200", "00200"])
def test_the_best_has_a_text_encoder_of_its_own(full, base, heard, kind):
    found = find(f"run:dog-1@{kind}", heard)
    assert_weights(found, base | {part: moved(base[part], 0.25) for part in ("unet", "text_encoder")})
    assert families.describe(found).address == "run:dog-1@200"


def test_averages_are_what_a_user_wants(full, base, heard, write_checkpoint):
    before = find("run:dog-1@last", heard).revision
    write_checkpoint(full, 400, {"ema/unet.safetensors": moved(base["unet"], 2)})
    assert find("run:dog-1@last", heard).revision != before
    assert_weights(find("run:dog-1@last", heard), base | {"unet": moved(base["unet"], 2)})


def test_a_checkpoint_is_put_together_once_and_anew_where_it_changed(full, base, heard, write_checkpoint):
    first = find("run:dog-1@400", heard)
    made = (first.folder / "model_index.json").lstat()
    assert find("run:dog-1@400", heard) == first
    assert (first.folder / "model_index.json").lstat() == made
    write_checkpoint(full, 400, {"weights/unet.safetensors": moved(base["unet"], 3)})
    second = find("run:dog-1@400", heard)
    assert second.revision != first.revision
    assert_weights(second, base | {"unet": moved(base["unet"], 3)})
    write_checkpoint(full, 400, {"weights/text_encoder.safetensors": moved(base["text_encoder"], 3)})
    assert_weights(
        find("run:dog-1@400", heard), base | {part: moved(base[part], 3) for part in ("unet", "text_encoder")}
    )
    full.update(identifier="zwx")
    renamed = find("run:dog-1@400", heard)
    assert families.describe(renamed).identity_with([]).identifier == "zwx"
    assert json.loads((renamed.folder / "dbcap.json").read_text()) == {"identifier": "zwx", "class": "dog"}
    assert not list((cache_dir() / "checkpoints").glob("*.tmp"))


def test_another_process_may_be_faster(full, heard, monkeypatch, tmp_path):
    real, other = trained._publish, tmp_path / "other"

    def late(made, target):
        shutil.copytree(made, target, symlinks=True)
        (made / "model_index.json").rename(other)
        real(made, target)

    monkeypatch.setattr(trained, "_publish", late)
    found = find("run:dog-1@last", heard)
    assert other.exists()
    assert (found.folder / "model_index.json").is_file()


def test_a_cache_that_cannot_be_written(full, heard):
    cache_dir().mkdir(exist_ok=True)
    (cache_dir() / "checkpoints").touch()
    with pytest.raises(ModelError) as failure:
        find("run:dog-1@last", heard)
    assert re.fullmatch(r"cannot write \S*checkpoints: .+; make room there", str(failure.value))


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])  # the second is the layout of Stable Diffusion 2
def test_what_was_trained_on_a_model_in_one_file(write_run, write_checkpoint, family, heard, tmp_path, base, act):
    folder, path = write_diffusion(tmp_path / "folder", safety=2), tmp_path / "one.safetensors"
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": act}))
    family(folder).write_single_file(path)
    save_file(load_file(path), path, {"format": "pt"})
    configs = write_diffusion(tmp_path / "configs", inpaints=True, safety=2)  # its denoiser is another one
    shutil.copy(config, configs / "text_encoder")
    before = find(str(path), heard, base=str(configs))
    run = write_run(model=str(path), base=str(configs), revision=before.revision)
    new = moved(weights(folder, "unet"), 0.5)
    write_checkpoint(run, 3, {"weights/unet.safetensors": new})
    found = find("run:dog-1@last", heard, safety=True)
    assert found.single is None
    expected = {part: weights(folder, part) for part in ("vae", "text_encoder")} | {"unet": new}
    assert_weights(found, expected)
    model = families.describe(found)
    assert (model.inpaints, model.has_checker) == (False, False)
    assert json.loads((configs / "unet/config.json").read_text())["in_channels"] == 9
    assert heard.warned == []


def test_a_safety_checker_comes_along(write_run, write_checkpoint, checked, base, heard):
    folder = checked(2)
    run = write_run(model=str(folder), revision=revision(folder, heard))
    write_checkpoint(run, 3, {"weights/unet.safetensors": base["unet"]})
    plain, safe = (find("run:dog-1@last", heard, safety=safety) for safety in (False, True))
    assert plain.revision == safe.revision
    assert families.load(safe, "cpu", "float32").safety is not None
    names = {file.name for file in safe.files} - {file.name for file in plain.files}
    assert "safety_checker/model.safetensors" in names


# ---- the methods lora and embedding


@pytest.mark.parametrize("method", ["lora", "embedding"])
def test_an_adapter_belongs_to_the_model_before(write_run, write_checkpoint, tiny_diffusion, heard, method):
    before = find(str(tiny_diffusion), heard)
    run = write_run(model=str(tiny_diffusion), revision=before.revision)
    path = adapted(run, run.final, method)
    found = find("run:dog-1", heard)
    assert (found.folder, found.revision) == (before.folder, before.revision)
    (one,) = found.additions
    assert (one.path, one.scale, one.embedding, one.own) == (path, 1.0, method == "embedding", True)
    assert found.files == (*before.files, found.files[-1])
    assert (found.files[-1].name, found.files[-1].sha256) == (path.name, one.sha256)
    model = families.describe(found)
    assert (model.address, model.title, model.identity_with([])) == ("run:dog-1", "dog-1", WORDS)
    for step, name in ((100, "weights"), (200, "weights"), (200, "ema")):
        write_checkpoint(run, step, {f"{name}/adapter.safetensors": load_file(path)})
    assert find("run:dog-1@100", heard).additions[0].path == run.checkpoints / "000100/weights/adapter.safetensors"
    assert find("run:dog-1@last", heard).additions[0].path == run.checkpoints / "000200/ema/adapter.safetensors"


def test_the_run_says_what_its_word_is_whatever_the_model_before_says(write_run, tmp_path, heard):
    folder = write_diffusion(tmp_path / "cat")
    (folder / "dbcap.json").write_text('{"identifier": "zwx", "class": "cat"}')
    run = write_run(model=str(folder), revision=revision(folder, heard))
    adapted(run, run.final, "lora")
    assert families.describe(find("run:dog-1", heard)).identity_with([]) == WORDS


def test_a_lora_on_a_lora_and_what_is_trained_whole_on_one(write_run, write_checkpoint, tiny_diffusion, base, heard):
    first = write_run("first", model=str(tiny_diffusion), revision=revision(tiny_diffusion, heard))
    adapted(first, first.final, "embedding")
    second = write_run("second", model="run:first", revision=find("run:first", heard).revision)
    adapted(second, second.final, "lora")
    paths = [one.path for one in find("run:second", heard).additions]
    assert paths == [first.final / "dog-1.safetensors", second.final / "lora.safetensors"]
    third = write_run("third", model="run:second", revision=find("run:second", heard).revision, status="interrupted")
    write_checkpoint(third, 100, {"weights/unet.safetensors": base["unet"]})
    with pytest.raises(UsageError, match="run:third@100 was trained on run:second, which has a LoRA or embedding"):
        find("run:third@last", heard)


def test_a_damaged_checkpoint_is_refused_by_name(write_run, write_checkpoint, tiny_diffusion, base, heard):
    run = write_run("rex", model=str(tiny_diffusion), revision=revision(tiny_diffusion, heard), status="interrupted")
    file = write_checkpoint(run, 100, {"weights/unet.safetensors": base["unet"]}) / "weights" / "unet.safetensors"
    assert find("run:rex@100", heard).trained
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match=f"{file} is not what was written; `dbcap runs show rex` lists other checkp"):
        find("run:rex@100", heard)


# ---- the model before


def test_a_model_of_the_hub_is_that_of_its_commit(write_run, hub, tiny_diffusion, heard):
    server = hub()
    shutil.copytree(tiny_diffusion, server.repo("org/name"), dirs_exist_ok=True)
    commit = find("org/name", heard, offline=False).revision
    run = write_run(model="org/name", revision=commit)
    adapted(run, run.final, "lora")
    (server.repo("org/name") / "model_index.json").write_text("{}")  # it went on since
    asked = len(server.requests)
    found = find("run:dog-1", heard, offline=False)
    assert (found.revision, found.trained.model) == (commit, f"org/name@{commit}")
    assert len(server.requests) == asked, "what is cached need not be asked for"


def test_a_model_that_changed_or_is_gone_is_named(write_run, tmp_path, heard):
    folder = write_diffusion(tmp_path / "sd")
    before = revision(folder, heard)
    run = write_run(model=str(folder), revision=before)
    adapted(run, run.final, "lora")
    save_file(moved(weights(folder, "unet"), 1), folder / "unet/diffusion_pytorch_model.safetensors")
    found = find("run:dog-1", heard)
    said = f"its hash was {before[:12]} and is {found.revision[:12]}"
    assert heard.warned == [f"{folder} is not what run:dog-1 was trained on: {said}"]
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match=rf"^run:dog-1 needs {folder}, which it was trained on: no such folder"):
        find("run:dog-1", heard)


# ---- what is not there


def test_a_run_that_is_not_finished_names_its_newest_checkpoint(full, write_checkpoint, heard):
    full.update(status="running")
    with pytest.raises(DbcapError) as failure:
        find("run:dog-1", heard)
    assert failure.value.exit_code == 1
    assert failure.value.message == "the run dog-1 is not finished, but interrupted"
    assert failure.value.hint == "run:dog-1@last is its newest checkpoint, of step 400"
    with full.lock(), pytest.raises(DbcapError, match="is not finished, but running; run:dog-1@last is"):
        find("run:dog-1", heard)
    shutil.rmtree(full.checkpoints)
    with pytest.raises(DbcapError, match="is not finished, but interrupted; it has no checkpoint"):
        find("run:dog-1", heard)
    full.update(status="finished")
    shutil.rmtree(full.final)
    with pytest.raises(DbcapError, match="the run dog-1 has lost its folder `final`"):
        find("run:dog-1", heard)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run:dog-2", "there is no run dog-2; did you mean dog-1?"),
        ("run:cat", "there is no run cat; `dbcap runs list` shows those there are"),
        ("run:dog-1@300", "the run dog-1 has no checkpoint 300; there are 200, 400"),
        ("run:dog-1@best", "the run dog-1 has no checkpoint best; there are 200, 400"),
    ],
)
def test_a_missing_run_or_checkpoint(full, heard, text, said):
    (full.checkpoints / "best").unlink()
    (full.checkpoints / "000300").mkdir()  # no state: half of one
    with pytest.raises(UsageError) as failure:
        find(text, heard)
    assert str(failure.value) == said


def test_a_run_is_no_captioner_and_needs_no_base(full, heard, tmp_path):
    with pytest.raises(ModelError, match="run:dog-1 is a diffusion model, no captioner"):
        find("run:dog-1", heard, kind="captioner")
    with pytest.raises(UsageError, match="--base goes with"):
        find("run:dog-1", heard, base=str(tmp_path))
    assert find("run:dog-1", heard, kind=None).folder == full.final


@pytest.mark.parametrize(
    "damage",
    [{"base": None}, {"base": {}}, {"base": []}, {"base": "starter"}, {"base": {"model": "starter"}}],
    ids=str,
)
def test_a_damaged_manifest_is_named(full, heard, damage):
    full.update(**damage)
    with pytest.raises(ModelError) as failure:
        find("run:dog-1", heard)
    assert str(failure.value).startswith(f"{full.folder / 'run.json'} is damaged: ")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_lost_weights_are_named(full, heard, method):
    full.update(method=method)
    shutil.rmtree(full.checkpoints / "000400/weights")
    with pytest.raises(ModelError) as failure:
        find("run:dog-1@last", heard)
    said = f"{full.checkpoints / '000400'} lacks its weights; `dbcap runs show dog-1` lists what there is"
    assert str(failure.value) == said


def test_an_address_is_gone_with_its_run_or_checkpoint(full):
    assert [is_gone(text) for text in ("run:dog-1", "run:dog-1@200", "starter", "/no/folder")] == [False] * 4
    shutil.rmtree(full.checkpoints / "000200")
    assert [is_gone(text) for text in ("run:dog-1@200", "run:dog-1@best", "run:cat", "run:/")] == [True] * 4
    runs.remove(full)
    assert is_gone("run:dog-1")


# ---- `dbcap models show`


def test_what_is_told_without_loading(full, heard):
    final = inspect("run:dog-1", offline=True, events=heard, home=cache_dir())
    assert (final.spec.text, final.folder, final.kind) == ("run:dog-1", full.final, "diffusion")
    assert final.description.startswith("full, step 400 of the run dog-1, on /")
    found = inspect("run:dog-1@200", offline=True, events=heard, home=cache_dir())
    names = {file.name for file in found.files}
    assert {"weights/unet.safetensors", "weights/text_encoder.safetensors", "unet/config.json"} <= names
    assert "vae/diffusion_pytorch_model.safetensors" in names
    assert not names & {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    assert (found.problem, found.revision) == ("", "")


def test_what_is_told_of_an_adapter(write_run, tiny_diffusion, heard):
    run = write_run(model=str(tiny_diffusion), revision="")
    path = adapted(run, run.final, "lora")
    found = inspect("run:dog-1", offline=True, events=heard, home=cache_dir())
    assert found.revision == revision(tiny_diffusion, heard)
    assert (found.files[-1].name, found.files[-1].size) == ("lora.safetensors", path.stat().st_size)
    assert "unet/diffusion_pytorch_model.safetensors" in {file.name for file in found.files}
