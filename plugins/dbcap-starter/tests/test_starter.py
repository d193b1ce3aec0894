"""The starter distribution: what it says it holds is there, unchanged, and true."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
from PIL import Image

import dbcap_starter
from dbcap.files import sha256_of
from dbcap.plugins import loader
from dbcap.plugins.api import Plugin

ROOT = Path(__file__).parents[1]
WEIGHTS = "1b64af557f9a89776d2758a8fcc8bc696f1472a2c4654114966a511be269b553"
DIFFUSION_WEIGHTS = {
    "text_encoder/model.safetensors": "000abd728eb72be495e079304c4cbc819fbdc68fffcf26c3cee1d32db01ef565",
    "unet/diffusion_pytorch_model.safetensors": "6106b25c9e7c28b2402ca8189c5bf6776486f06c3001606f5713d42174f7b8ca",
    "vae/diffusion_pytorch_model.safetensors": "d3043ab2e4e2adaccd3a656d0c76be3d118b9dc5a41176e20c91250d27aa0063",
}
COLOURS = {"white", "black", "red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "gray"}
MODEL_FILES = [
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
]

DIFFUSION_FILES = [
    "README.md",
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

MODEL, DIFFUSION = dbcap_starter.Starter().models()


def rows() -> list[dict[str, str]]:
    lines = (dbcap_starter.samples() / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_model_entries_name_folders_with_the_files():
    assert (MODEL.name, MODEL.kind, MODEL.licence) == ("starter", "captioner", "MIT AND Apache-2.0")
    assert sorted(path.name for path in MODEL.folder.iterdir()) == MODEL_FILES
    assert (DIFFUSION.name, DIFFUSION.kind, DIFFUSION.licence) == ("starter", "diffusion", "MIT AND Apache-2.0")
    files = (path for path in DIFFUSION.folder.rglob("*") if path.is_file())
    assert sorted(path.relative_to(DIFFUSION.folder).as_posix() for path in files) == DIFFUSION_FILES


def test_the_weights_are_the_measured_ones():
    assert sha256_of(MODEL.folder / "model.safetensors") == WEIGHTS
    assert {name: sha256_of(DIFFUSION.folder / name) for name in DIFFUSION_WEIGHTS} == DIFFUSION_WEIGHTS


def test_the_entry_point_gives_the_plugin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, value),) = project["entry-points"][loader.PLUGINS].items()
    assert issubclass(EntryPoint(name, value, loader.PLUGINS).load(), Plugin)
    assert project["dependencies"] == ["dbcap"]


def test_the_installed_distribution_is_found_by_dbcap(monkeypatch):
    monkeypatch.delenv(loader.SWITCH, raising=False)
    assert "starter" in entry_points(group=loader.PLUGINS).names, "install it: pip install -e plugins/dbcap-starter"
    loader.reset()
    (report,) = [one for one in loader.reports(deep=True) if one.distribution == "dbcap-starter"]
    assert (report.status, report.error, report.slow) == ("ok", "", False)
    assert [model for model in loader.models() if model.name == "starter"] == [MODEL, DIFFUSION]


def test_the_code_imports_only_the_plugin_api():
    imported = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module)
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
    assert {name for name in imported if name.startswith("dbcap")} == {"dbcap.plugins.api"}


def test_the_rows_of_the_samples_match_the_files():
    files = sorted(path.name for path in dbcap_starter.samples().glob("*.png"))
    assert [row["file_name"] for row in rows()] == files
    assert len(files) == 24
    for name in files:
        with Image.open(dbcap_starter.samples() / name) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))


def test_the_samples_cover_both_styles_with_every_colour():
    captions = [
        re.fullmatch("(a 3d render|a flat drawing) of a (.+) on a (.+) background", row["text"]) for row in rows()
    ]
    pairs = {(caption[1], caption[3]) for caption in captions}
    assert pairs == {(style, colour) for style in ("a 3d render", "a flat drawing") for colour in COLOURS}
    assert len({caption[2] for caption in captions}) == len(captions)


def test_the_wheel_would_contain_the_weights_and_the_samples():
    hatchling = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    builder = hatchling.WheelBuilder(str(ROOT))
    files = {file.distribution_path.replace("\\", "/") for file in builder.recurse_included_files()}
    wanted = {f"dbcap_starter/captioner/{name}" for name in MODEL_FILES}
    wanted |= {f"dbcap_starter/diffusion/{name}" for name in DIFFUSION_FILES}
    wanted |= {f"dbcap_starter/samples/{row['file_name']}" for row in rows()}
    assert wanted | {"dbcap_starter/samples/metadata.jsonl", "dbcap_starter/py.typed"} <= files


def test_the_licence_texts_are_named_in_the_notice_and_there():
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    named = re.findall(r"licenses/[\w-]+\.txt", notice)
    assert sorted(set(named)) == sorted(f"licenses/{path.name}" for path in (ROOT / "licenses").iterdir())


def test_the_model_captions_every_sample_right():
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel

    model = VisionEncoderDecoderModel.from_pretrained(MODEL.folder, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(MODEL.folder, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(MODEL.folder)
    images = [Image.open(dbcap_starter.samples() / row["file_name"]) for row in rows()]
    with torch.inference_mode():
        tokens = model.generate(processor(images, return_tensors="pt").pixel_values, num_beams=1)
    assert tokenizer.batch_decode(tokens, skip_special_tokens=True) == [row["text"] for row in rows()]


def test_the_card_lists_the_names():
    card = (DIFFUSION.folder / "README.md").read_text(encoding="utf-8")
    names = re.search(r"## The 120 names\n\n(.+?)\.\n", card, flags=re.DOTALL)[1].replace("\n", " ").split(", ")
    assert len(set(names)) == 120
    assert names == sorted(names)
    spoken = json.loads((DIFFUSION.folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    words = {word.removesuffix("</w>") for word in spoken["model"]["vocab"]}
    assert {word for name in names for word in name.split()} <= words


def test_the_model_draws_what_it_is_told():
    import torch
    from diffusers import StableDiffusionPipeline
    from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel

    prompts = ["a 3d render of an anchor on a blue background", "a flat drawing of an airplane on a orange background"]
    painter = StableDiffusionPipeline.from_pretrained(DIFFUSION.folder, dtype=torch.float32)
    painter.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(0) for _ in prompts]
    images = painter(prompts, num_inference_steps=20, guidance_scale=3.0, generator=generators).images
    assert {image.size for image in images} == {(64, 64)}
    model = VisionEncoderDecoderModel.from_pretrained(MODEL.folder, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(MODEL.folder, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(MODEL.folder)
    with torch.inference_mode():
        tokens = model.generate(processor(images, return_tensors="pt").pixel_values, num_beams=1)
    assert tokenizer.batch_decode(tokens, skip_special_tokens=True) == prompts
