"""Fixtures of all tests: those that dbcap gives to plugin authors, and where this checkout's shared folder is."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from dbcap.testing import *  # noqa: F403 - pytest finds fixtures by name

ROOT = Path(__file__).parent.parent

settings.register_profile("untimed", deadline=None)  # how long an example takes says nothing on a busy machine
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def signals() -> None:
    """Take signals as in a terminal: `nohup` and a shell's background jobs ignore some, and so would all they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of photos and models beside the checkout; tests that need it are skipped elsewhere."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("there is no folder `shared` beside this checkout")
    return folder


@pytest.fixture(scope="session")
def tiny_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion pipeline of 32x32 pixels with random weights."""
    from dbcap.testing.diffusion import write_diffusion  # it loads torch and diffusers

    return write_diffusion(tmp_path_factory.mktemp("diffusion") / "sd")


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of SDXL."""
    from dbcap.testing.diffusion import write_diffusion  # it loads torch and diffusers

    return write_diffusion(tmp_path_factory.mktemp("diffusion") / "xl", xl=True)


@pytest.fixture(scope="session")
def tiny_dataset(tiny_diffusion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `dbcap prep --crop none` makes: three photos of a dog called sks, and two own photos of the class."""
    import numpy as np
    from PIL import Image

    from dbcap.dataset import store
    from dbcap.dataset.manifest import ClassSettings, DataSet, Photo
    from dbcap.files import sha256_of

    folder, classes = tmp_path_factory.mktemp("data") / "dog", tmp_path_factory.mktemp("class") / "dogs"
    (folder / "train").mkdir(parents=True)
    classes.mkdir()

    def draw(path: Path, seed: int, width: int, height: int) -> str:
        values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        path.write_bytes(store.png_of(Image.fromarray(values)))
        return sha256_of(path)

    photos = []
    for number, (width, height) in enumerate([(34, 32), (32, 33), (32, 32)]):
        digest = draw(folder / "train" / f"{number}.png", number, width, height)
        words = "a sks dog on a table" if number == 1 else "a photo of a sks dog"
        photos.append(Photo(f"{number}.png", digest, words, "template", f"/photos/{number}.png", digest, width, height))
    for number in range(2):
        draw(classes / f"{number}.png", 10 + number, 32, 32)
    settings = ClassSettings(100, ("a photo of a dog",), 1.0, 30, str(classes))
    DataSet(folder, str(tiny_diffusion), None, 32, "none", "sks", "dog", tuple(photos), settings).write()
    return folder


@pytest.fixture(scope="session")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """Return a function that gives `tiny_diffusion` with a safety checker of this threshold: -2 flags all, 2 none."""
    from dbcap.testing.diffusion import write_diffusion  # it loads torch and diffusers

    @cache
    def make(threshold: float) -> Path:
        return write_diffusion(tmp_path_factory.mktemp("diffusion") / "checked", safety=threshold)

    return make


@pytest.fixture(scope="session")
def dividing(checked: Callable[[float], Path]) -> Callable[..., float]:
    """Return a function that gives a threshold far from any of these pictures, RGB arrays: it flags some, not all."""
    import torch
    from diffusers import StableDiffusionPipeline
    from PIL import Image

    def call(pictures: list[Any]) -> float:
        pipeline = StableDiffusionPipeline.from_pretrained(checked(2), dtype=torch.float32)
        checker, cosines = pipeline.safety_checker, []
        for picture in map(Image.fromarray, pictures):
            given = pipeline.feature_extractor(picture, return_tensors="pt").pixel_values
            with torch.no_grad():
                seen = checker.visual_projection(checker.vision_model(given).pooler_output)
            cosines.append(torch.cosine_similarity(seen, checker.concept_embeds).max().item())
        gap, between = max((high - low, (high + low) / 2) for low, high in pairwise(sorted(cosines)))
        assert gap > 0.003  # scores are rounded to 0.001
        return float(between)

    return call


@pytest.fixture
def write_run(home: Path) -> Callable[..., Any]:
    """Return a function that writes a run by hand, as training leaves it: a finished one if nothing else is said."""
    from dbcap import runs

    def call(name: str = "dog-1", *, model: str = "starter", base: str | None = None, revision: str = "", **said: Any):
        run = runs.Run(runs.folder() / name)
        usual = {"status": "finished", "step": 400, "steps": 400, "method": "full", "identifier": "sks", "class": "dog"}
        rest = {"data": {}, "best": None, "versions": {}, "host": {}, "timings": {}, "message": ""}
        times = dict.fromkeys(("created", "changed"), "2026-11-25T12:00:00+00:00")
        where = {"config": {"model": "as it was typed", "base": None, "lr": 1e-5}}
        where["base"] = {"model": model, "base": base, "revision": revision, "files": {}}
        run.write({"name": name} | usual | rest | times | where | said)
        return run

    return call


@pytest.fixture
def write_checkpoint() -> Callable[..., Path]:
    """Return a function that gives a run a checkpoint with these files: path in it -> tensors."""
    from safetensors.torch import save_file

    from dbcap.files import sha256_of

    def call(run: Any, step: int, files: dict[str, dict[str, Any]] | None = None, best: bool = False) -> Path:
        folder = run.checkpoints / f"{step:06d}"
        for name, tensors in (files or {}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / name)
        folder.mkdir(parents=True, exist_ok=True)
        hashes = {str(path.relative_to(folder)): sha256_of(path) for path in folder.rglob("*.safetensors")}
        (folder / "state.json").write_text(json.dumps({"files": hashes} if hashes else {}))
        if best:
            (run.checkpoints / "best").symlink_to(folder.name)
        return folder

    return call


@pytest.fixture(scope="session")
def family() -> Callable[..., Any]:
    """Return a function that loads a folder's family object."""
    from dbcap.models.families import load
    from dbcap.models.hub import LocalModel
    from dbcap.models.specs import parse

    def call(folder: Path, dtype: str = "float32") -> Any:
        local = LocalModel(parse(str(folder)), folder, "", ())
        return load(local, "cpu", dtype)

    return call
