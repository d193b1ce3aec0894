"""Textual inversion files against diffusers' own loader, and those that do not fit."""

import re

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from dbcap.errors import ModelError, UsageError
from dbcap.models.families import load
from dbcap.models.hub import LocalModel
from dbcap.models.specs import parse
from dbcap.testing.diffusion import write_diffusion

PROMPT = "a sks2 dog and a sks2 cat"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("embeddings")
    return {"sd": write_diffusion(place / "sd"), "xl": write_diffusion(place / "xl", xl=True)}


def family(folder):
    return load(LocalModel(parse(str(folder)), folder, "", ()), "cpu", "float32")


@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("by_key", [False, True])
def test_the_word_means_what_diffusers_makes_of_it(folders, tmp_path, vectors, by_key):
    table = torch.randn(vectors, 32, generator=torch.Generator().manual_seed(0))
    path = tmp_path / ("other.safetensors" if by_key else "sks2.safetensors")
    save_file({"sks2" if by_key else "emb_params": table}, path)
    one = family(folders["sd"])
    one.add_embedding(path)
    pipeline = StableDiffusionPipeline.from_pretrained(folders["sd"])
    pipeline.load_textual_inversion({"sks2": table}, token="sks2")
    theirs, _ = pipeline.encode_prompt(PROMPT, "cpu", 1, False)
    torch.testing.assert_close(one.encode(PROMPT, 1, (32, 32)).states, theirs[0])
    assert len(one.tokens(PROMPT)) == 6 + 2 * (vectors - 1) + 1


def test_xl_has_a_table_for_each_encoder(folders, tmp_path):
    random = torch.Generator().manual_seed(0)
    save_file(
        {name: torch.randn(2, 32, generator=random) for name in ("clip_l", "clip_g")}, tmp_path / "sks2.safetensors"
    )
    plain, taught = family(folders["xl"]), family(folders["xl"])
    taught.add_embedding(tmp_path / "sks2.safetensors")
    before, after = (one.encode(PROMPT, 1, (32, 32)).states for one in (plain, taught))
    for half in (slice(0, 32), slice(32, 64)):
        assert not torch.allclose(before[:, half], after[:, half])
    without = "a red dog"
    assert torch.equal(plain.encode(without, 1, (32, 32)).states, taught.encode(without, 1, (32, 32)).states)


@pytest.mark.parametrize(
    ("model", "tensors", "words"),
    [
        ("sd", {"emb_params": (1, 7)}, "its vectors have 7 numbers, and this model's 32"),
        ("sd", {"clip_l": (1, 32), "clip_g": (1, 32)}, "is for a model with 2 text encoders, and this one has 1"),
        ("xl", {"emb_params": (1, 32)}, "is for a model with 1 text encoders, and this one has 2"),
        ("xl", {"clip_l": (1, 32), "clip_g": (2, 32)}, "holds no embedding"),
        ("sd", {"a": (1, 32), "b": (1, 32)}, "holds no embedding: a, b"),
        ("sd", {"emb_params": (1, 2, 3)}, "holds no embedding"),
        ("sd", {"": (1, 32)}, "its word is empty"),
        ("sd", {" \n": (1, 32)}, "its word is empty"),
        ("sd", {"dog": (1, 32)}, "the word 'dog' is known to this model already"),
    ],
)
def test_files_that_do_not_fit_are_named(folders, tmp_path, model, tensors, words):
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "new.safetensors")

    def use():
        one = family(folders[model])
        one.add_embedding(tmp_path / "new.safetensors")
        one.encode("a dog", 1, (32, 32))

    with pytest.raises(UsageError, match=re.escape(words)):
        use()


def test_a_damaged_file_is_one_line(folders, tmp_path):
    (tmp_path / "new.safetensors").write_bytes(b"\x08")
    one = family(folders["sd"])
    with pytest.raises(ModelError, match=r"new\.safetensors cannot be read: .*; it must be a whole \.safetensors file"):
        one.add_embedding(tmp_path / "new.safetensors")
