"""Stable Diffusion 1.x and 2.x: equal to diffusers' pipeline, part by part."""

from __future__ import annotations

import inspect
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from dbcap.errors import ModelError
from dbcap.testing.diffusion import LENGTH, SIZE, write_diffusion
from dbcap.testing.models import WORDS

ROOM = LENGTH - 2
LONG = [WORDS[number % len(WORDS)] for number in range(2 * ROOM + 3)]


@pytest.fixture(scope="session")
def ours(family, tiny_diffusion):
    return family(tiny_diffusion)


def states(family, text, chunks=1):
    return family.encode(text, chunks, (SIZE, SIZE)).states


def test_what_it_is(ours):
    assert (ours.factor, ours.size, ours.latent_channels, ours.inpaints, ours.room) == (4, SIZE, 4, False, ROOM)
    assert ours.scheduler_config["_class_name"] == "DDIMScheduler"


def test_a_model_that_inpaints(family, tmp_path):
    assert family(write_diffusion(tmp_path / "model", inpaints=True)).inpaints


@pytest.mark.parametrize("text", ["", WORDS[0], " ".join(LONG[:ROOM])])
def test_a_prompt_is_encoded_as_diffusers_does(ours, their_sd, text):
    with torch.inference_mode():
        (wanted,) = their_sd.encode_prompt(text, "cpu", 1, do_classifier_free_guidance=False)[0]
    assert torch.equal(states(ours, text), wanted)


def test_a_long_prompt_is_cut_or_encoded_in_chunks(ours, their_sd):
    assert len(ours.tokens(" ".join(LONG))) == len(LONG) > 2 * ROOM
    pieces = [" ".join(LONG[start : start + ROOM]) for start in range(0, len(LONG), ROOM)]
    assert len(pieces) == 3
    apart = [states(ours, piece) for piece in pieces]
    together = states(ours, " ".join(LONG), 3)
    assert together.shape == (3 * LENGTH, apart[0].shape[1])
    torch.testing.assert_close(together, torch.cat(apart))
    torch.testing.assert_close(states(ours, " ".join(LONG), 1), apart[0])
    torch.testing.assert_close(states(ours, pieces[2], 2), torch.cat([apart[2], states(ours, "")]))


def test_no_library_talks_of_a_long_prompt(family, tiny_diffusion, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert len(family(tiny_diffusion).tokens(" ".join(LONG))) == len(LONG)
    assert caplog.messages == []


def test_tokens_spell_the_words(ours):
    text = " ".join(LONG)
    assert ours.text_of(ours.tokens(text)) == text
    assert ours.text_of(ours.tokens(text)[ROOM:]) == " ".join(LONG[ROOM:])


@pytest.mark.parametrize("size", [(SIZE, SIZE), (SIZE, 2 * SIZE)])
def test_the_denoiser_predicts_what_diffusers_does(ours, their_sd, size):
    width, height = size
    latents = torch.randn(2, 4, height // 4, width // 4, generator=torch.Generator().manual_seed(0))
    conditions = [ours.encode(text, 1, size) for text in ("", WORDS[1])]
    time = torch.tensor(500)
    with torch.inference_mode():
        found = ours.predict(latents, time, conditions)
        wanted = their_sd.unet(latents, time, torch.stack([one.states for one in conditions])).sample
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_latents_are_decoded_as_diffusers_does(ours, their_sd):
    latents = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(1))
    found = ours.decode(latents)
    with torch.inference_mode():
        sample = their_sd.vae.decode(latents[None] / their_sd.vae.config.scaling_factor).sample
    (wanted,) = their_sd.image_processor.postprocess(sample)
    assert (found.shape, found.dtype) == ((32, 64, 3), torch.uint8)
    assert np.abs(found.numpy().astype(int) - np.asarray(wanted).astype(int)).max() <= 1


def test_a_picture_is_encoded_as_diffusers_does(ours, their_sd):
    pixels = torch.randint(0, 256, (SIZE, 2 * SIZE, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    found = ours.encode_picture(pixels)
    with torch.inference_mode():
        prepared = their_sd.image_processor.preprocess(pixels.permute(2, 0, 1)[None].float() / 255)
        wanted = their_sd.vae.encode(prepared).latent_dist.mean[0] * their_sd.vae.config.scaling_factor
    assert found.shape == (4, SIZE // 4, SIZE // 2)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_shift_goes_in_and_out(family, tiny_diffusion, tmp_path):
    folder = shutil.copytree(tiny_diffusion, tmp_path / "model")
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps({**config, "shift_factor": 0.25, "scaling_factor": 2.0}))
    plain = json.loads((tiny_diffusion / "vae/config.json").read_text())["scaling_factor"]
    pixels = torch.full((SIZE, SIZE, 3), 90, dtype=torch.uint8)
    mean = family(tiny_diffusion).encode_picture(pixels) / plain
    shifted = family(folder)
    torch.testing.assert_close(shifted.encode_picture(pixels), (mean - 0.25) * 2)
    torch.testing.assert_close(
        shifted.decode((mean - 0.25) * 2).int(), family(tiny_diffusion).decode(mean * plain).int(), rtol=0, atol=1
    )


@pytest.mark.parametrize(
    ("dtype", "vae"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float32)]
)
def test_number_formats(family, tiny_diffusion, dtype, vae):
    one = family(tiny_diffusion, dtype)
    assert one.unet.dtype == getattr(torch, dtype)
    assert one.vae.dtype == vae
    assert states(one, WORDS[0]).dtype == getattr(torch, dtype)


def test_the_text_encoder_can_be_let_go_and_comes_back(family, tiny_diffusion):
    one = family(tiny_diffusion)
    first = states(one, WORDS[0])
    one.release_text()
    assert one._encoders is None
    assert torch.equal(states(one, WORDS[0]), first)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"_class_name": "FluxPipeline"}', "model is a FluxPipeline, which dbcap does not know; dbcap knows"),
        ("{}", "model names no kind of pipeline"),
        ("{", r"model_index\.json is damaged: "),
        ("[]", r"model_index\.json is damaged: "),
    ],
)
def test_what_is_no_family(family, tmp_path, content, message):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        family(tmp_path / "model")


def test_parts_that_are_damaged_are_one_line(family, tiny_diffusion, tmp_path):
    folder = shutil.copytree(tiny_diffusion, tmp_path / "model")
    (folder / "tokenizer/tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"the tokenizer of .*model cannot be loaded: "):
        family(folder).tokens("a")
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="model cannot be loaded: "):
        family(folder).unet  # noqa: B018 - the property loads it


def test_configs_may_leave_out_what_diffusers_takes_as_usual(family, tiny_diffusion, tmp_path):
    folder = shutil.copytree(tiny_diffusion, tmp_path / "model")
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        path = folder / part / "config.json"
        usual = {name: one.default for name, one in inspect.signature(kind.__init__).parameters.items()}
        config = json.loads(path.read_text())
        kept = {name: value for name, value in config.items() if name not in usual or value != usual[name]}
        assert len(kept) < len(config) - 5
        path.write_text(json.dumps(kept))
    short, whole = family(folder), family(tiny_diffusion)
    assert (short.size, short.factor, short.latent_channels) == (whole.size, whole.factor, whole.latent_channels)
    picture = short.decode(torch.ones(4, 8, 8))
    assert torch.equal(picture, whole.decode(torch.ones(4, 8, 8)))
    assert torch.equal(short.encode_picture(picture), whole.encode_picture(picture))
    condition = short.encode("a dog", 1, (32, 32))
    latents = torch.ones(1, 4, 8, 8)
    with torch.inference_mode():
        found = short.predict(latents, torch.tensor(1), [condition])
        assert torch.equal(found, whole.predict(latents, torch.tensor(1), [condition]))


@pytest.mark.parametrize("folder", ["tiny_diffusion", "tiny_xl"])
def test_a_batch_of_captions_is_told_as_each_one_is(family, folder, request):
    model = family(request.getfixturevalue(folder))
    texts = ["a dog", "a cat on a table"]
    encoders = [model.module(name, torch.float32) for _, name, _ in model.text_parts]
    rows = [torch.cat(one) for one in zip(*(model.token_rows(text, 1) for text in texts), strict=True)]
    told = model.tell(encoders, rows, (SIZE, SIZE))
    for number, text in enumerate(texts):
        alone = model.encode(text, 1, (SIZE, SIZE))
        torch.testing.assert_close(told.states[number], alone.states, rtol=0, atol=1e-5)
        assert told.added.keys() == alone.added.keys()
        for name, value in alone.added.items():
            torch.testing.assert_close(told.added[name][number], value, rtol=0, atol=1e-5)


def test_a_module_to_be_trained_is_a_copy_with_plain_layers(family, tiny_diffusion):
    model = family(tiny_diffusion, "bfloat16")
    before = (tiny_diffusion / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    unet = model.module("unet", torch.float32)
    assert {one.dtype for one in unet.parameters()} == {torch.float32}
    assert type(unet.conv_in) is torch.nn.Conv2d
    with torch.no_grad():
        for one in unet.parameters():
            one.zero_()
    again = model.module("unet", torch.float32)
    assert any(one.any() for one in again.parameters())
    assert (tiny_diffusion / "unet/diffusion_pytorch_model.safetensors").read_bytes() == before


def test_a_picture_is_encoded_to_the_autoencoders_distribution(family, ours, tiny_diffusion):
    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    mean, deviation = ours.encode_distribution(picture)
    vae = AutoencoderKL.from_pretrained(tiny_diffusion, subfolder="vae")
    with torch.no_grad():
        found = vae.encode(picture.permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
    torch.testing.assert_close(mean, found.mean[0] * vae.config.scaling_factor)
    torch.testing.assert_close(deviation, found.std[0] * vae.config.scaling_factor)
    assert torch.equal(ours.encode_picture(picture), mean)
