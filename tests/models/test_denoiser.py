"""The denoiser's own layers and attention give what diffusers' give."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from torch.nn import functional

from dbcap.models import cpu, denoiser, packed
from dbcap.models.packed import can_pack

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of the root mean square of what is compared."""


def unet(dtype: torch.dtype, linear: bool) -> UNet2DConditionModel:
    """Return a UNet with 20 x 20 places in its first level: more than torch's attention is left with."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=20,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=24,
        use_linear_projection=linear,
    )
    return model.to(dtype).eval().requires_grad_(False)


def run(model: UNet2DConditionModel, side: int, rows: int = 2) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(side)
    latents = torch.randn(rows, 4, side, side, generator=drawn).to(model.dtype)
    told = torch.randn(rows, 7, 24, generator=drawn).to(model.dtype)
    latents = latents.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        return model(latents, torch.tensor(500), encoder_hidden_states=told).sample.float()


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.shape == expected.shape
    error = (found - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("linear", [False, True], ids=["convolutions", "linear layers"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_denoiser_gives_what_diffusers_gives(dtype, linear):
    exact = unet(torch.float32, linear)
    exact.load_state_dict({name: tensor.float() for name, tensor in unet(dtype, linear).state_dict().items()})
    fast, released = unet(dtype, linear), []
    denoiser.speed_up(fast, lambda: released.append(1))
    for side in (20, 24, 20):
        assert_near(run(fast, side), run(exact, side), dtype)
    assert released or not can_pack(next(fast.parameters()))


def test_a_result_does_not_depend_on_the_sizes_before():
    one, other = unet(torch.float32, True), unet(torch.float32, True)
    for model in (one, other):
        denoiser.speed_up(model, lambda: None)
    run(one, 24)
    run(one, 20, rows=5)
    assert torch.equal(run(one, 20), run(other, 20))


def test_attention_in_bfloat16_is_replaced_but_where_torch_has_amx(monkeypatch):
    kinds = {}
    for name in ("avx512-bf16", "amx"):
        monkeypatch.setattr(cpu, "cpu_class", lambda name=name: name)
        model = unet(torch.bfloat16, True)
        denoiser.speed_up(model, lambda: None)
        kinds[name] = {type(one) for one in model.attn_processors.values()}
    assert kinds["avx512-bf16"] == {denoiser.Attend}
    assert denoiser.Attend not in kinds["amx"]


@pytest.mark.parametrize("block", [1, 50_000, 2**24], ids=["a row", "some rows", "all"])
def test_blocks_of_any_size_attend_alike(block, monkeypatch):
    monkeypatch.setattr(denoiser, "BLOCK", block)
    drawn = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 37, 8, generator=drawn)
    key, value = torch.randn(2, 2, 3, 41, 8, generator=drawn)
    expected = functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(denoiser.in_blocks(query, key, value), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_gated_unit_gives_what_diffusers_gives(dtype, bias):
    torch.manual_seed(0)
    plain = GEGLU(32, 48, bias=bias).to(dtype).requires_grad_(False)
    if not can_pack(plain.proj.weight):
        pytest.skip(f"this machine packs no {dtype}")
    x = torch.randn(2, 5, 32).to(dtype)
    with torch.inference_mode():
        expected = plain.float()(x.float())
        assert_near(denoiser.GatedLinear(plain.to(dtype))(x).float(), expected, dtype)


def test_where_nothing_is_packed_layers_stay(monkeypatch):
    for module in (packed, denoiser):
        monkeypatch.setattr(module, "can_pack", lambda _: False)
    plain, model = unet(torch.float32, False), unet(torch.float32, False)
    denoiser.speed_up(model, lambda: None)
    assert {type(one) for one in model.modules()} == {type(one) for one in plain.modules()}
    assert torch.equal(run(model, 20), run(plain, 20))


def test_a_model_has_the_fast_layers_unless_it_is_compiled(family, tiny_diffusion):
    fast, compiled = family(tiny_diffusion), family(tiny_diffusion)
    compiled.compile()
    ours = {packed.Linear, packed.Convolution, denoiser.GatedLinear}
    assert ours.isdisjoint({type(one) for one in compiled.unet.modules()})
    if can_pack(torch.zeros(2, 2)):
        assert ours <= {type(one) for one in fast.unet.modules()}
