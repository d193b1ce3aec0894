"""The sampling loop against diffusers' own pipelines, and what it promises of batches and seeds."""

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from dbcap.generation import sampling, schedulers
from dbcap.generation.sampling import Settings, Start

PIPELINES = {"tiny_diffusion": StableDiffusionPipeline, "tiny_xl": StableDiffusionXLPipeline}
PROMPT = "a red dog on the beach"
SHAPE = (4, 8, 8)
EVERY = [schedulers.OWN, *schedulers.SCHEDULERS]


def latents(one, name, seeds, settings, start=None, negative=""):
    """Sample as `dbcap generate` does."""
    told, against = (one.encode(text, 1, (32, 32)) for text in (PROMPT, negative))
    return sampling.denoise(
        one,
        schedulers.make(name, one.scheduler_config),
        [told] * len(seeds),
        [against] * len(seeds) if settings.guidance > 1 else None,
        [sampling.generator(seed) for seed in seeds],
        SHAPE,
        settings,
        device=one.device,
        start=start,
    )


def decoded(one, rows):
    return np.stack([one.decode(row).numpy() for row in rows]).astype(int)


def grey_levels(pictures):
    return (np.asarray(pictures) * 255).round().astype(int)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("model", PIPELINES)
def test_pictures_are_those_of_the_pipeline(model, name, family, request):
    folder = request.getfixturevalue(model)
    one = family(folder)
    found = decoded(one, latents(one, name, [3, 4], Settings(5, 3.0), negative="a cat"))
    pipeline = PIPELINES[model].from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = schedulers.make(name, one.scheduler_config)
    theirs = pipeline(
        PROMPT,
        negative_prompt="a cat",
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        num_images_per_prompt=2,
        width=32,
        height=32,
        output_type="np",
    ).images
    assert np.abs(found - grey_levels(theirs)).max() <= 1
    assert len(np.unique(found)) > 50, "it is a picture"


@pytest.mark.parametrize("name", EVERY)
def test_every_sampler_begins_with_a_picture(name, family, tiny_diffusion):
    one = family(tiny_diffusion)
    picture = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    start = Start(one.encode_picture(picture))
    near, far = (latents(one, name, [1, 2], Settings(10, 3.0, strength=s), start) for s in (0.2, 1.0))
    assert torch.isfinite(near).all()
    assert torch.isfinite(far).all()
    distance = [(found - start.latents).abs().mean() for found in (near, far)]
    assert distance[0] < distance[1], "less strength stays nearer to the picture"


def test_image_to_image_is_that_of_the_pipeline(family, tiny_diffusion, monkeypatch):
    one = family(tiny_diffusion)
    picture = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = decoded(one, latents(one, "ddim", [5], Settings(10, 3.0, strength=0.6), Start(one.encode_picture(picture))))
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(tiny_diffusion)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = schedulers.make("ddim", one.scheduler_config)
    # It draws from the distribution that the encoder gives, dbcap takes the mean: let it take the mean as well.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, *_, **__: self.mode())
    theirs = pipeline(
        PROMPT,
        image=picture.permute(2, 0, 1)[None].float() / 255,
        strength=0.6,
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(5)],
        output_type="np",
    ).images
    assert np.abs(found - grey_levels(theirs)).max() <= 1


@pytest.mark.parametrize("model", ["tiny_diffusion", "tiny_inpainting"])
def test_a_mask_keeps_the_rest(model, family, request):
    one = family(request.getfixturevalue(model))
    picture = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    clean = one.encode_picture(picture)
    start = Start(clean, mask, clean * (1 - mask) if one.inpaints else None)
    found = latents(one, "ddim", [1, 2], Settings(6, 3.0), start)
    assert torch.isfinite(found).all()
    if not one.inpaints:
        torch.testing.assert_close(found[:, :, :, :4], clean[None, :, :, :4].expand(2, -1, -1, -1))
    assert (found[:, :, :, 4:] - clean[None, :, :, 4:]).abs().mean() > 0.1


def test_the_inpainting_denoiser_gets_what_the_pipeline_gives_it(family, tiny_inpainting):
    one = family(tiny_inpainting)
    seen = []
    one.unet.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    clean = torch.randn(SHAPE)
    mask = torch.zeros(8, 8)
    mask[2:5, 3:] = 1
    latents(one, "ddim", [1], Settings(2, 1.0), Start(clean, mask, clean * (1 - mask)))
    assert seen[0].shape == (1, 9, 8, 8), StableDiffusionInpaintPipeline.__name__
    torch.testing.assert_close(seen[0][0, 4], mask)
    torch.testing.assert_close(seen[0][0, 5:], clean * (1 - mask))


@pytest.mark.parametrize("name", EVERY)
def test_an_image_of_a_batch_is_that_of_its_seed_alone(name, family, tiny_diffusion):
    one = family(tiny_diffusion)
    settings = Settings(4, 3.0, eta=0.5)
    together = decoded(one, latents(one, name, [7, 8, 9], settings))
    for row, seed in enumerate((7, 8, 9)):
        alone = decoded(one, latents(one, name, [seed], settings))[0]
        assert np.abs(together[row] - alone).max() <= 1
    mates = latents(one, name, [7, 1, 2], settings)[0]
    assert torch.equal(latents(one, name, [7, 8, 9], settings)[0], mates), "one shape: to the bit"


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_every_seed_of_64_bits_has_noise_of_its_own(seed):
    drawn = sampling.noise([sampling.generator(seed)], SHAPE)
    torch.testing.assert_close(drawn, sampling.noise([sampling.generator(seed)], SHAPE), rtol=0, atol=0)
    for other in (seed ^ 1, seed ^ 2**63, seed ^ 2**40):
        assert not torch.equal(drawn, sampling.noise([sampling.generator(other)], SHAPE))


def test_without_guidance_the_denoiser_runs_once_a_step(family, tiny_diffusion):
    one = family(tiny_diffusion)
    rows = []
    one.unet.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    latents(one, "euler", [1, 2], Settings(3, 1.0))
    assert rows == [2, 2, 2]
    rows.clear()
    latents(one, "euler", [1, 2], Settings(3, 3.0))
    assert rows == [4, 4, 4]


def test_guidance_is_the_papers():
    torch.manual_seed(0)
    positive, negative = torch.randn(2, 3, 4, 8, 8).double()
    plain = sampling.guided(positive, negative, 7.5, 0)
    torch.testing.assert_close(plain, 7.5 * positive - 6.5 * negative)
    whole = sampling.guided(positive, negative, 7.5, 1.0)
    for row in range(3):
        assert whole[row].std().item() == pytest.approx(positive[row].std().item())
    half = sampling.guided(positive, negative, 7.5, 0.5)
    torch.testing.assert_close(half, (plain + whole) / 2)


@pytest.mark.parametrize(
    ("steps", "strength", "kept"),
    [(10, 1.0, 10), (10, 0.8, 8), (10, 0.1, 1), (10, 0.09, 0), (3, 1 / 3, 1), (100, 0.29, 29)],
)
def test_strength_is_the_share_of_the_steps(steps, strength, kept):
    assert schedulers.kept_steps(steps, strength) == kept
