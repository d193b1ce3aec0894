"""A caption depends on its image, the model and the options: not on mates, place, batch size, workers or order."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dbcap_starter
from dbcap.captioning.captioner import TransformersCaptioner
from dbcap.captioning.decoding import Decoding
from dbcap.testing.models import write_tiny, write_tiny_blip, write_tiny_git

pytestmark = pytest.mark.usefixtures("one_thread")

STARTER = Path(dbcap_starter.__file__).parent / "captioner"
GREEDY = Decoding(max_length=14)
BEAMS = Decoding(max_length=14, num_beams=3, num_captions=2)
MODELS = ("starter", "vit-gpt2", "swin-bert", "blip", "git")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "starter": STARTER,
        "vit-gpt2": write_tiny(root / "vit-gpt2"),
        "swin-bert": write_tiny(root / "swin-bert", "swin", "bert"),
        "blip": write_tiny_blip(root / "blip"),
        "git": write_tiny_git(root / "git"),
    }


@pytest.fixture(scope="module")
def pictures(samples) -> list[Image.Image]:
    """The samples, and noise: seven of each, which no batch size divides."""
    noise = np.random.default_rng(0)
    return [
        *(Image.open(path).convert("RGB") for path in samples[:7]),
        *(Image.fromarray(noise.integers(0, 256, (40, 50, 3), np.uint8)) for _ in range(7)),
    ]


def in_batches(loaded: Any, pixels: np.ndarray, order: list[int], size: int, decoding: Decoding) -> list[list[Any]]:
    """Caption in this order and in batches of this size, the last one filled up; return what each image got."""
    found: dict[int, list[Any]] = {}
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        batch = pixels[numbers + numbers[-1:] * (size - len(numbers))]
        for number, row in zip(numbers, loaded.generate(batch, decoding.as_dict(), [0] * size), strict=False):
            found[number] = [(candidate.text, candidate.score) for candidate in row]
    return [found[number] for number in range(len(pixels))]


def shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def near(one: list[list[Any]], two: list[list[Any]]) -> None:
    """Fail unless the captions are equal, but for ties within 1e-5, and the scores nearly."""
    for first, second in zip(one, two, strict=True):
        scores = np.array([[score for _, score in row] for row in (first, second)])
        assert np.abs(scores[0] - scores[1]).max() <= 1e-5
        texts = [[text for text, _ in row] for row in (first, second)]
        ties = np.abs(np.diff(scores[0])) <= 1e-5
        assert texts[0] == texts[1] or ties.any()


@pytest.mark.parametrize("decoding", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("model", MODELS)
def test_float32_is_the_same_at_every_batch_size_and_place(model, decoding, folders, load, pictures):
    loaded = load(folders[model])
    pixels = np.stack([loaded.prepare(picture) for picture in pictures])
    whole = in_batches(loaded, pixels, list(range(len(pixels))), len(pixels), decoding)
    assert len({row[0][0] for row in whole}) > 3, "the model says the same of everything"
    if model == "vit-gpt2":
        assert len({len(row[0][0].split()) for row in whole}) > 2, "captions must end at their own time"
    for size in (1, 3, 8):
        near(in_batches(loaded, pixels, shuffled(len(pixels), size), size, decoding), whole)


@pytest.mark.parametrize("decoding", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize(("model", "dtype"), [*((model, "bfloat16") for model in MODELS), ("vit-gpt2", "float16")])
def test_low_precision_is_bitwise_the_same_at_every_place(model, dtype, decoding, folders, load, pictures):
    """At one batch shape: whatever the other rows hold, wherever the row is, in the last batch that is filled up."""
    loaded = load(folders[model], dtype)
    pixels = np.stack([loaded.prepare(picture) for picture in pictures])
    for size in (1, 5) if decoding is GREEDY else (3,):
        first = in_batches(loaded, pixels, list(range(len(pixels))), size, decoding)
        assert len({row[0][0] for row in first}) > 3, "the model says the same of everything"
        assert in_batches(loaded, pixels, shuffled(len(pixels), size), size, decoding) == first
        alone = loaded.generate(np.repeat(pixels[5:6], size, axis=0), decoding.as_dict(), [0] * size)
        assert all([(item.text, item.score) for item in row] == first[5] for row in alone)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_several_threads_do_not_make_place_matter(dtype, load, pictures):
    torch.set_num_threads(2)
    loaded = load(STARTER, dtype)
    pixels = np.stack([loaded.prepare(picture) for picture in pictures])
    first = in_batches(loaded, pixels, list(range(len(pixels))), 8, GREEDY)
    second = in_batches(loaded, pixels, shuffled(len(pixels), 1), 8, GREEDY)
    if dtype == "float32":
        near(second, first)
    else:
        assert second == first


# ---- the whole way


@pytest.fixture
def many(work, samples) -> Path:
    folder = work / "many"
    folder.mkdir()
    for number, path in enumerate(samples[:14]):
        shutil.copyfile(path, folder / f"{number:02}.png")
    return folder


def test_float32_rows_are_the_same_at_every_batch_size_and_number_of_workers(caption, many):
    words = ["many", "--format", "jsonl", "--num-beams", "3", "--num-captions", "2"]
    expected = caption(*words).rows
    for size in ("1", "3", "8"):
        rows = caption(*words, "--batch-size", size).rows
        for row, other in zip(rows, expected, strict=True):
            assert {**row, "captions": 0} == {**other, "captions": 0}
            assert [item["text"] for item in row["captions"]] == [item["text"] for item in other["captions"]]
            assert [item["score"] for item in row["captions"]] == pytest.approx(
                [item["score"] for item in other["captions"]], abs=1e-3
            )
    outputs = [caption(*words, "--batch-size", "3", "--workers", workers).out for workers in ("0", "1", "4")]
    assert outputs == [outputs[0]] * 3


def test_bfloat16_rows_do_not_depend_on_order_workers_or_failures_between(caption, many):
    words = ["--format", "jsonl", "--dtype", "bfloat16", "--batch-size", "4"]
    names = [f"many/{number:02}.png" for number in range(14)]
    expected = sorted(caption(*names, *words).out.splitlines())
    mixed = [names[number] for number in shuffled(14, 3)]
    for order in (mixed, mixed[::-1]):
        for workers in ("0", "3"):
            assert sorted(caption(*order, *words, "--workers", workers).out.splitlines()) == expected
    between = [item for name in mixed for item in (name, f"{name}.none")]
    result = caption(*between, *words)
    assert result.code == 3
    assert sorted(result.out.splitlines()) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_batches_of_a_run_have_one_shape(dtype, caption, many, monkeypatch):
    """The last one too, and those that failed inputs leave gaps in; few inputs make a small shape."""
    shapes: list[tuple[int, ...]] = []
    original = TransformersCaptioner.generate

    def generate(self: TransformersCaptioner, pixels: np.ndarray, options: Any, seeds: Any) -> Any:
        shapes.append(pixels.shape)
        assert len(seeds) == len(pixels)
        return original(self, pixels, options, seeds)

    monkeypatch.setattr(TransformersCaptioner, "generate", generate)
    caption("many", "--batch-size", "4", "--dtype", dtype)
    assert shapes == [(4, 3, 64, 64)] * 4
    shapes.clear()
    Path("many/05.png").write_text("no picture")
    caption("many", "none.png", "--batch-size", "64", "--dtype", dtype)
    assert shapes == [(15, 3, 64, 64)]
    shapes.clear()
    caption("many/01.png", "many/02.png", "--batch-size", "64", "--dtype", dtype)
    assert shapes == [(2, 3, 64, 64)]


def test_copies_of_an_image_get_the_same_caption(caption, many):
    for name in ("a.png", "z.png"):
        shutil.copyfile("many/05.png", f"many/{name}")
    for dtype in ("float32", "bfloat16"):
        rows = {
            row["path"]: json.dumps(row["captions"])
            for row in caption("many", "--format", "jsonl", "--dtype", dtype, "--batch-size", "3").rows
        }
        assert rows["many/05.png"] == rows["many/a.png"] == rows["many/z.png"]
