"""Diffusion pipelines from a hub on loopback and from folders: fetched whole, shown, listed, or refused in one line."""

from __future__ import annotations

import shutil

import pytest

from dbcap.config import paths
from dbcap.errors import ModelError
from dbcap.models import remote
from dbcap.models.hub import locate
from dbcap.models.reports import cached_models, inspect

PAINTER = "org/painter"
OF_PARTS = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


def paint(text, heard, kind="diffusion", offline=False):
    return locate(text, kind=kind, offline=offline, events=heard, home=paths.cache_dir())


def show(text, heard, offline=False):
    return inspect(text, offline=offline, events=heard, home=paths.cache_dir())


def refusal(*arguments, **named):
    """Return the one line of the error that this call must raise."""
    with pytest.raises(ModelError) as failure:
        paint(*arguments, **named)
    line = str(failure.value)
    assert "\n" not in line
    assert len(line) < 400
    return line


@pytest.fixture
def gallery(hub, tiny_diffusion):
    """A hub with a pipeline and what others have beside theirs."""
    started = hub()
    folder = started.repo(PAINTER)
    shutil.copytree(tiny_diffusion, folder, dirs_exist_ok=True)
    (folder / "README.md").write_text("---\nlicense: openrail\n---\n# A model\n")
    unread = ["v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.bin", "vae/model.onnx"]
    unread += ["unet/diffusion_pytorch_model.fp16.safetensors", "safety_checker/pytorch_model.bin"]
    for name in unread:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not wanted")
    return started


def paths_fetched(hub):
    """Return the paths of the files that were sent, in order."""
    return [one.path.split("/", 5)[5] for one in hub.requests if one.method == "GET" and "/resolve/" in one.path]


def test_a_pipeline_is_fetched_whole_once_and_needs_no_hub_then(gallery, heard, tiny_diffusion):
    model = paint(PAINTER, heard)
    assert sorted(paths_fetched(gallery)) == OF_PARTS
    assert [name.endswith(".safetensors") for name in paths_fetched(gallery)] == [False] * 7 + [True] * 3
    assert heard.said[0].startswith(f"downloading {PAINTER} (10 files, ")
    assert sorted(file.name for file in model.files) == OF_PARTS
    assert all((model.folder / name).read_bytes() == (tiny_diffusion / name).read_bytes() for name in OF_PARTS)
    stated = {file.name: file.sha256 for file in model.files}
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert stated[weights] == gallery.hashes(tiny_diffusion / weights)[1]
    gallery.stop()
    gallery.requests.clear()
    assert paint(PAINTER, heard, offline=True) == model
    assert paint(PAINTER, heard) == model
    assert paint(PAINTER, heard, offline=True, kind=None) == model
    assert gallery.requests == []


def test_whatever_it_is_can_be_fetched(gallery, heard, tiny_captioner):
    shutil.copytree(tiny_captioner, gallery.repo("org/tiny"), dirs_exist_ok=True)
    assert paint(PAINTER, heard) == paint(PAINTER, heard, kind=None)
    assert paint("org/tiny", heard, kind="captioner") == paint("org/tiny", heard, kind=None)


def test_xl_has_two_of_some_parts(hub, heard, tiny_xl):
    shutil.copytree(tiny_xl, hub().repo(PAINTER), dirs_exist_ok=True)
    names = {file.name for file in paint(PAINTER, heard).files}
    assert {"text_encoder_2/model.safetensors", "text_encoder_2/config.json", "tokenizer_2/tokenizer.json"} < names


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pipeline_without_weights(part, gallery, heard):
    for file in (gallery.repo(PAINTER) / part).iterdir():
        if file.suffix in (".safetensors", ".bin"):
            file.unlink()
    assert f"{PAINTER} has no weights that dbcap reads for its {part};" in refusal(PAINTER, heard)
    assert paths_fetched(gallery) == []


def test_xl_without_the_weights_of_its_second_encoder(hub, heard, tiny_xl):
    started = hub()
    shutil.copytree(tiny_xl, started.repo(PAINTER), dirs_exist_ok=True)
    (started.repo(PAINTER) / "text_encoder_2/model.safetensors").unlink()
    assert "has no weights that dbcap reads for its text_encoder_2;" in refusal(PAINTER, heard)


def test_one_kind_is_not_the_other(gallery, heard, tiny_captioner, tiny_diffusion):
    shutil.copytree(tiny_captioner, gallery.repo("org/tiny"), dirs_exist_ok=True)
    for painter, captioner in ((PAINTER, "org/tiny"), (str(tiny_diffusion), str(tiny_captioner))):
        assert f"{painter} is a diffusion pipeline, no captioner;" in refusal(painter, heard, kind="captioner")
        line = refusal(captioner, heard)
        assert f"{captioner} is a captioner, no diffusion pipeline;" in line
    assert paths_fetched(gallery) == []


def test_shards_of_a_pipeline(hub, heard, tiny_diffusion):
    from diffusers import UNet2DConditionModel

    from dbcap.models.pipelines import weight_files

    started = hub()
    folder = started.repo(PAINTER)
    shutil.copytree(tiny_diffusion, folder, dirs_exist_ok=True)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    UNet2DConditionModel.from_pretrained(tiny_diffusion / "unet").save_pretrained(
        folder / "unet", max_shard_size="300KB"
    )
    shards = sorted(path.name for path in (folder / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    model = paint(PAINTER, heard)
    assert sorted(path.name for path in weight_files(model.folder / "unet")) == shards
    (model.folder / "unet" / shards[-1]).unlink()
    assert f"{PAINTER} is not in the cache" in refusal(PAINTER, heard, offline=True)
    (folder / "unet" / shards[-1]).unlink()
    line = refusal(str(folder), heard)
    assert f"has no unet/{shards[-1]}, which unet/diffusion_pytorch_model.safetensors.index.json names" in line


def test_a_pipeline_of_half_precision_files_only(hub, heard, tiny_diffusion):
    started = hub()
    folder = started.repo(PAINTER)
    shutil.copytree(tiny_diffusion, folder, dirs_exist_ok=True)
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    names = {file.name for file in paint(PAINTER, heard).files if file.name.endswith("safetensors")}
    assert names == {
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    }


def test_a_pipeline_is_shown(gallery, heard):
    report = show(PAINTER, heard)
    assert (report.kind, report.model_type, report.licence) == ("diffusion", "StableDiffusionPipeline", "openrail")
    assert (report.cached, report.folder, report.pickled, report.problem) == (False, None, False, "")
    assert report.revision == gallery.commit(PAINTER)
    assert sorted(file.name for file in report.files) == OF_PARTS
    assert report.size == sum((gallery.repo(PAINTER) / name).stat().st_size for name in OF_PARTS)
    assert paths_fetched(gallery) == ["model_index.json"]
    paint(PAINTER, heard)
    report = show(PAINTER, heard)
    assert (report.cached, report.folder) == (True, remote.snapshot_folder(PAINTER, report.revision))
    offline = show(PAINTER, heard, offline=True)
    for name in ("revision", "files", "kind", "model_type", "size", "folder"):
        assert getattr(offline, name) == getattr(report, name)


def test_a_pipeline_in_a_folder_is_shown(home, heard, tiny_diffusion):
    report = show(str(tiny_diffusion), heard)
    assert (report.kind, report.model_type, report.problem) == ("diffusion", "StableDiffusionPipeline", "")
    assert sorted(file.name for file in report.files) == OF_PARTS
    assert report.revision == paint(str(tiny_diffusion), heard).revision


def test_a_folders_revision_covers_every_part(home, heard, tiny_diffusion, tmp_path):
    folder = shutil.copytree(tiny_diffusion, tmp_path / "copied")
    seen = {paint(str(tiny_diffusion), heard).revision, paint(str(folder), heard).revision}
    assert len(seen) == 1
    for name in OF_PARTS:
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
        seen.add(paint(str(folder), heard).revision)
    assert len(seen) == 1 + len(OF_PARTS)


def test_pipelines_in_the_list_of_the_cache(gallery, heard):
    from huggingface_hub import hf_hub_download

    for name in ("model_index.json", "unet/config.json"):
        hf_hub_download(PAINTER, name, cache_dir=remote.cache_folder(), endpoint=gallery.url)
    (torn,) = cached_models()
    assert (torn.kind, torn.complete) == ("diffusion", False)
    paint(PAINTER, heard)
    (whole,) = cached_models()
    assert (whole.kind, whole.complete, whole.revision) == ("diffusion", True, gallery.commit(PAINTER))


@pytest.mark.parametrize(
    "missing",
    ["vae/config.json", "unet/config.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"],
)
def test_a_small_file_that_is_missing_makes_a_snapshot_incomplete(missing, gallery, heard):
    model = paint(PAINTER, heard)
    (model.folder / missing).unlink()
    assert "is not in the cache" in refusal(PAINTER, heard, offline=True)
    assert paint(PAINTER, heard) == model
    assert paths_fetched(gallery).count(missing) == 1  # its content is in the cache still


def test_a_folder_that_is_not_whole_is_shown_with_its_problem(home, heard, tiny_diffusion, tmp_path):
    folder = shutil.copytree(tiny_diffusion, tmp_path / "copied")
    (folder / "unet/config.json").unlink()
    assert show(str(folder), heard).problem == f"{folder} has no unet/config.json"


def test_a_damaged_model_index(home, heard, tiny_diffusion, tmp_path):
    folder = shutil.copytree(tiny_diffusion, tmp_path / "copied")
    for content in ("{", "[]"):
        (folder / "model_index.json").write_text(content)
        with pytest.raises(ModelError, match=r"model_index\.json is damaged"):
            show(str(folder), heard)
