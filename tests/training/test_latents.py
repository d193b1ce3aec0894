"""Latents on disk, by content: never those of another picture, size or view."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dbcap.errors import DbcapError, InputError
from dbcap.events import Silent
from dbcap.files import sha256_of
from dbcap.testing.diffusion import write_diffusion
from dbcap.training import latents
from dbcap.training.latents import Cache, Latent, Source, View

WHOLE = View((0, 0, 32, 32))


@pytest.fixture
def picture(tmp_path):
    """Return a function that writes a picture of noise and gives its source."""

    def call(seed: int, name: str = "", width: int = 32, height: int = 32) -> Source:
        path = tmp_path / (name or f"{seed}.png")
        values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(values).save(path)
        return Source(path, sha256_of(path))

    return call


class Encoder:
    """Gives a family object, and counts how often."""

    def __init__(self, model, family):
        self.loads, self._model, self._family = 0, model, family

    def __call__(self):
        self.loads += 1
        return self._family(self._model)


@pytest.fixture
def encoder(tiny_diffusion, family):
    return Encoder(tiny_diffusion, family)


@pytest.fixture
def cache(tmp_path, encoder):
    """Return a function that opens the cache, as each command does."""

    def call(folder: str = "cache", size: int = 32, vae: str = "v") -> Cache:
        return Cache(tmp_path / folder, vae, size, encoder)

    return call


@pytest.fixture
def fresh(cache):
    """Return a function that encodes without a cache."""
    count = iter(range(1000))

    def call(source: Source, view: View = WHOLE, size: int = 32) -> Latent:
        return cache(f"fresh-{next(count)}", size).all_of([(source, view)], Silent())[0]

    return call


def same(one: Latent, other: Latent) -> bool:
    return torch.equal(one.mean, other.mean) and torch.equal(one.deviation, other.deviation)


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.safetensors"))


# ---- views


@given(width=st.integers(1, 3000), height=st.integers(1, 3000))
def test_views_are_squares_from_one_end_to_the_other(width, height):
    boxes = [view.box for view in latents.views(width, height, flip=False)]
    side = min(width, height)
    assert {(right - left, lower - top) for left, top, right, lower in boxes} == {(side, side)}
    assert boxes[0][:2] == (0, 0)
    assert boxes[-1][2:] == (width, height)
    assert len(boxes) == len(set(boxes)) == min(latents.PLACES, max(width, height) - side + 1)
    left, top, right, lower = latents.held_out(width, height).box
    assert 0 <= left < right <= width
    assert 0 <= top < lower <= height
    assert right - left == lower - top == max(1, round(side * latents.HELD_OUT))


def test_views_of_a_wide_and_of_a_tall_picture():
    wide, tall = latents.views(40, 32, flip=False), latents.views(32, 40, flip=False)
    assert [view.box for view in wide] == [(at, 0, at + 32, 32) for at in (0, 2, 4, 6, 8)]
    assert [view.box for view in tall] == [(0, at, 32, at + 32) for at in (0, 2, 4, 6, 8)]
    assert latents.views(32, 32, flip=True) == [WHOLE, View(WHOLE.box, mirrored=True)]
    assert latents.held_out(40, 32) == View((5, 1, 34, 30)), "nearer than any view"


# ---- encoding


def test_latents_are_those_of_the_autoencoder(cache, picture, tiny_diffusion):
    source = picture(0)
    found = cache().all_of([(source, WHOLE)], Silent())[0]
    vae = AutoencoderKL.from_pretrained(tiny_diffusion / "vae")
    pixels = torch.from_numpy(np.array(Image.open(source.path))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist
    scale = vae.config.scaling_factor
    torch.testing.assert_close(found.mean, scale * expected.mean[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.deviation, scale * expected.std[0], atol=1e-6, rtol=1e-5)
    noise = torch.randn(found.mean.shape, generator=torch.Generator().manual_seed(0))
    drawn = scale * (expected.mean[0] + expected.std[0] * noise)
    torch.testing.assert_close(found.drawn(noise), drawn, atol=1e-6, rtol=1e-5)


def test_a_view_is_cut_out_brought_to_size_and_mirrored(cache, picture, tmp_path):
    wide = picture(1, width=50, height=40)
    cut = Image.open(wide.path).crop((10, 0, 50, 40)).resize((32, 32), Image.Resampling.LANCZOS)
    cut.save(tmp_path / "cut.png")
    cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirrored.png")
    by_hand = [(Source(path, sha256_of(path)), WHOLE) for path in (tmp_path / "cut.png", tmp_path / "mirrored.png")]
    box = (10, 0, 50, 40)
    found = cache().all_of([(wide, View(box)), (wide, View(box, mirrored=True)), *by_hand], Silent())
    assert same(found[0], found[2])
    assert same(found[1], found[3])
    assert not same(found[0], found[1])


# ---- by content


@given(seed=st.integers(0, 10**6))
def test_in_any_order_each_gets_its_own(seed, picture_set):
    """diffusers trains on latents of other pictures when these come in another order (its issue 14430)."""
    cache, wanted, expected = picture_set
    order = random.Random(seed).choices(range(len(wanted)), k=8)
    found = cache().all_of([wanted[at] for at in order], Silent())
    assert all(same(one, expected[at]) for one, at in zip(found, order, strict=True))


@pytest.fixture(scope="module")
def picture_set(tmp_path_factory, tiny_diffusion, family):
    """A way to open a cache, four pictures with two views each, and their latents."""
    folder, wanted = tmp_path_factory.mktemp("set"), []
    for seed in range(4):
        path = folder / f"{seed}.png"
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 40, 3), np.uint8)).save(path)
        wanted += [(Source(path, sha256_of(path)), view) for view in (WHOLE, View((8, 0, 40, 32)))]

    def cache(name: str = "cache") -> Cache:
        return Cache(folder / name, "v", 32, lambda: family(tiny_diffusion))

    expected = [cache(f"alone-{at}").all_of([pair], Silent())[0] for at, pair in enumerate(wanted)]
    return cache, wanted, expected


def test_what_is_there_is_not_encoded_again(cache, encoder, picture):
    wanted = [(picture(seed), WHOLE) for seed in range(2)]
    first = cache().all_of(wanted, Silent())
    second = cache().all_of(wanted[::-1], Silent())
    assert encoder.loads == 1
    assert [same(*pair) for pair in zip(first, second[::-1], strict=True)] == [True, True]
    cache().all_of([*wanted, (picture(2), WHOLE)], Silent())
    assert encoder.loads == 2


def test_renamed_and_edited_pictures(cache, encoder, picture, fresh):
    one, other = picture(0, "a.png"), picture(1, "b.png")
    before = cache().all_of([(one, WHOLE), (other, WHOLE)], Silent())
    one.path.rename(one.path.with_name("c.png"))
    renamed = Source(one.path.with_name("c.png"), one.sha256)
    edited = picture(2, "b.png")
    found = cache().all_of([(edited, WHOLE), (renamed, WHOLE)], Silent())
    assert encoder.loads == 2, "only what is new"
    assert same(found[1], before[0])
    assert same(found[0], fresh(edited))
    assert not same(found[0], before[1])


def test_another_size_view_and_autoencoder_are_others(cache, picture, fresh, tmp_path, family):
    source = picture(0, width=40, height=40)
    views = [View((0, 0, 40, 40)), View((0, 0, 40, 40), mirrored=True), View((4, 4, 36, 36))]
    found = [
        *cache().all_of([(source, view) for view in views], Silent()),
        *cache(size=64).all_of([(source, views[0])], Silent()),
    ]
    expected = [*(fresh(source, view) for view in views), fresh(source, views[0], 64)]
    assert all(same(*pair) for pair in zip(found, expected, strict=True))
    assert found[3].mean.shape == (4, 16, 16)
    other = write_diffusion(tmp_path / "other", seed=1)
    second = Cache(tmp_path / "cache", "w", 32, lambda: family(other)).all_of([(source, views[0])], Silent())[0]
    assert not same(second, found[0])
    assert same(cache().all_of([(source, views[0])], Silent())[0], found[0])
    assert len(files(tmp_path)) == 5


# ---- damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b"garbage" * 100),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"mean"', b'"neam"')),
        lambda path: path.unlink(),
    ],
    ids=["empty", "cut", "garbage", "other names", "gone"],
)
def test_a_damaged_file_is_made_again(damage, cache, encoder, picture, tmp_path):
    wanted = [(picture(seed), WHOLE) for seed in range(2)]
    before = cache().all_of(wanted, Silent())
    damage(files(tmp_path)[0])
    found = cache().all_of(wanted, Silent())
    assert encoder.loads == 2
    assert [same(*pair) for pair in zip(found, before, strict=True)] == [True, True]
    cache().all_of(wanted, Silent())
    assert encoder.loads == 2


def test_a_picture_that_changes_meanwhile_is_not_taken_for_what_it_was(cache, picture, tmp_path):
    source = picture(0, "a.png")
    picture(1, "a.png")
    with pytest.raises(DbcapError, match=r"a\.png was changed just now; run the same command again"):
        cache().all_of([(source, WHOLE)], Silent())
    assert files(tmp_path) == []


def test_a_picture_that_cannot_be_read_is_named(cache, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    source = Source(tmp_path / "a.png", sha256_of(tmp_path / "a.png"))
    with pytest.raises(InputError) as failure:
        cache().all_of([(source, WHOLE)], Silent())
    assert str(failure.value).startswith(f"{tmp_path / 'a.png'}: ")


def test_what_was_encoded_before_it_was_stopped_stays(cache, encoder, picture, tmp_path, monkeypatch):
    wanted = [(picture(seed), WHOLE) for seed in range(3)]
    encode, count = Cache._encode, iter(range(10))

    def stop(self, source, view):
        if next(count) == 2:
            raise KeyboardInterrupt
        encode(self, source, view)

    monkeypatch.setattr(Cache, "_encode", stop)
    with pytest.raises(KeyboardInterrupt):
        cache().all_of(wanted, Silent())
    before = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
    assert len(before) == 2
    cache().all_of(wanted, Silent())
    assert len(files(tmp_path)) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
