"""Stable Diffusion XL: equal to diffusers' pipeline, part by part."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from dbcap.testing.diffusion import LENGTH, SIZE
from dbcap.testing.models import WORDS

ROOM = LENGTH - 2
LONG = [WORDS[number % len(WORDS)] for number in range(ROOM + 3)]
SIDES = (SIZE, 2 * SIZE)


@pytest.fixture(scope="session")
def ours(family, tiny_xl):
    return family(tiny_xl)


def theirs(pipeline, text, **more):
    with torch.inference_mode():
        return pipeline.encode_prompt(text, device="cpu", do_classifier_free_guidance=True, **more)


def test_a_prompt_is_encoded_as_diffusers_does(ours, their_xl):
    text = " ".join(WORDS[:5])
    states, nothing, pooled, pooled_nothing = theirs(their_xl, text)
    found, empty = ours.encode(text, 1, SIDES), ours.encode("", 1, SIDES)
    assert torch.equal(found.states, states[0])
    assert torch.equal(found.added["text_embeds"], pooled[0])
    assert torch.equal(empty.states, nothing[0])
    assert not empty.states.any()
    assert torch.equal(empty.added["text_embeds"], pooled_nothing[0])


def test_a_model_that_was_trained_with_the_empty_prompt(family, tiny_xl, their_xl, tmp_path):
    folder = shutil.copytree(tiny_xl, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    _, nothing, _, pooled = theirs(their_xl, WORDS[0], negative_prompt="")
    found = family(folder).encode("", 1, SIDES)
    assert nothing.any()
    assert torch.equal(found.states, nothing[0])
    assert torch.equal(found.added["text_embeds"], pooled[0])


def test_the_size_is_told(ours, their_xl):
    height, width = SIDES[::-1]
    wanted = their_xl._get_add_time_ids((height, width), (0, 0), (height, width), torch.float32, 32)
    assert torch.equal(ours.encode("", 1, SIDES).added["time_ids"], wanted[0])


def test_a_long_prompt_in_chunks(ours):
    """States of every piece side by side; the projection is that of the first."""
    pieces = [ours.encode(" ".join(words), 1, SIDES) for words in (LONG[:ROOM], LONG[ROOM:])]
    found = ours.encode(" ".join(LONG), 2, SIDES)
    assert found.states.shape[0] == 2 * LENGTH
    torch.testing.assert_close(found.states, torch.cat([piece.states for piece in pieces]))
    torch.testing.assert_close(found.added["text_embeds"], pieces[0].added["text_embeds"])


def test_the_denoiser_predicts_what_diffusers_does(ours, their_xl):
    latents = torch.randn(2, 4, 16, 8, generator=torch.Generator().manual_seed(0))
    conditions = [ours.encode(text, 1, SIDES) for text in ("", WORDS[1])]
    added = {name: torch.stack([one.added[name] for one in conditions]) for name in ("text_embeds", "time_ids")}
    time = torch.tensor(500)
    with torch.inference_mode():
        found = ours.predict(latents, time, conditions)
        wanted = their_xl.unet(
            latents, time, torch.stack([one.states for one in conditions]), added_cond_kwargs=added
        ).sample
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    other = ours.encode(WORDS[1], 1, SIDES[::-1])
    assert not torch.equal(ours.predict(latents[1:], time, [other]), found[1:])
