"""A UNet's own layers for training give gradients as exact as torch's, and the same bits each time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from dbcap.models import cpu
from dbcap.training import attention, gradients, kernels
from dbcap.training.kernels import checkpointed, speed_up

BF16, FP32 = torch.bfloat16, torch.float32
Gradients = dict[str, torch.Tensor]


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is ours, however small, in pieces that are smaller than what is worked on."""
    for module, name, value in (
        (kernels, "WEIGHTS", 0),
        (kernels, "FEATURES", 0),
        (kernels, "ROWS", 0),
        (gradients, "LARGE", 0),
        (gradients, "ROWS", 96),
        (gradients, "ELEMENTS", 3000),
        (attention, "KEYS", 160),
        (attention, "BLOCK", 200_000),
    ):
        monkeypatch.setattr(module, name, value)


def unet(dtype: torch.dtype = BF16, **changes: Any) -> UNet2DConditionModel:
    """Return a UNet whose weights are numbers of bfloat16."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "sample_size": 20,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": 24,
    }
    return UNet2DConditionModel(**(settings | changes)).bfloat16().to(dtype).train()


def run(model: nn.Module, side: int = 20, seed: int = 0) -> torch.Tensor:
    """Return a loss: a number that depends on all parameters."""
    dtype, drawn = next(model.parameters()).dtype, torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, 2, 4, side, side, generator=drawn).bfloat16()
    told = torch.randn(2, 7, 24, generator=drawn).bfloat16().to(dtype)
    found = model(latents.to(dtype), torch.tensor([10, 500]), encoder_hidden_states=told).sample
    return (found.float() - noise.float()).square().mean()


def differentiate(model: nn.Module, side: int = 20, seed: int = 0) -> Gradients:
    model.zero_grad()
    run(model, side, seed).backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def assert_same(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the length of the error as a share of the length."""
    assert found.shape == exact.shape
    return ((found.float() - exact).norm() / exact.norm()).item()


def worst(ours: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor], *given: torch.Tensor) -> float:
    """Return the largest error of a function of bfloat16 and of its gradients."""
    inputs = [one.to(BF16).requires_grad_() for one in given]
    floats = [one.detach().float().requires_grad_() for one in inputs]
    found, exact = ours(*inputs), plain(*floats)
    above = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(BF16)
    back = torch.autograd.grad(found, inputs, above)
    assert {one.dtype for one in (found, *back)} == {BF16}
    return max(map(error, (found, *back), (exact, *torch.autograd.grad(exact, floats, above.float()))))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heads(batch: int, places: int, count: int, size: int, seed: int) -> torch.Tensor:
    """Return what a linear layer gives, as heads: (B, H, S, D), not contiguous."""
    return drawn(batch, places, count, size, seed=seed).transpose(1, 2)


@pytest.mark.parametrize("kind", ["amx", "avx512-bf16"])
@pytest.mark.parametrize(("sharp", "limit"), [(1, 0.006), (6, 0.015)], ids=["flat", "sharp"])
@pytest.mark.parametrize(
    ("places", "keys"), [(300, 300), (37, 301), (150, 7), (64, 64)], ids=["blocks", "odd", "prompt", "short"]
)
def test_attention_is_attention(places, keys, sharp, limit, kind, monkeypatch):
    monkeypatch.setattr(cpu, "cpu_class", lambda: kind)
    monkeypatch.setattr(attention, "KEYS", 128)
    monkeypatch.setattr(attention, "BLOCK", 50_000)
    query = heads(2, places, 3, 40, seed=1) * sharp
    key, value = (heads(2, keys, 3, 40, seed=seed) for seed in (2, 3))
    assert worst(attention.Attention.apply, functional.scaled_dot_product_attention, query, key, value) < limit


def test_scores_that_are_far_above_the_mean_are_torchs(monkeypatch):
    monkeypatch.setattr(cpu, "cpu_class", lambda: "avx512-bf16")
    query, key = heads(1, 300, 2, 8, seed=1) * 40, heads(1, 300, 2, 8, seed=2) * 40
    value = heads(1, 300, 2, 8, seed=3)
    scores = (query @ key.mT) * 8**-0.5
    assert (scores.amax(-1) - scores.mean(-1)).max() > 89
    found = attention.Attention.apply(*(one.to(BF16) for one in (query, key, value)))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*(one.to(BF16) for one in (query, key, value)))
    assert torch.equal(found, flash[0])


@settings(max_examples=30)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(5, 11), st.integers(5, 11)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 2)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.sampled_from([0, 10**9]),
    st.sampled_from([0, 2**17]),
)
def test_a_convolution_is_a_convolution(sizes, sides, kernel, stride, padding, few, large):
    batch, channels, filters = sizes
    given = drawn(batch, channels, *sides), drawn(filters, channels, *kernel, seed=1), drawn(filters, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "FEW", few)
        patch.setattr(gradients, "LARGE", large)
        found = worst(
            lambda *some: gradients.Convolution.apply(*some, stride, padding),
            lambda *some: functional.conv2d(*some, stride, padding),
            *(one.contiguous(memory_format=torch.channels_last) if one.dim() == 4 else one for one in given),
        )
    assert found < 0.01


@pytest.mark.parametrize("activate", [False, True])
@pytest.mark.parametrize("elements", [100, 2**18], ids=["pieces", "whole"])
def test_normalising_is_normalising(elements, activate, monkeypatch):
    monkeypatch.setattr(gradients, "ELEMENTS", elements)

    def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        normal = functional.group_norm(x, 4, weight, bias, 1e-5)
        return functional.silu(normal) if activate else normal

    x = (drawn(3, 24, 7, 5) * 2 + 3).to(memory_format=torch.channels_last)
    parameters = drawn(24, seed=1), drawn(24, seed=2)
    assert torch.equal(gradients.Normalise.apply(x, *parameters, 4, 1e-5, activate), plain(x, *parameters))
    assert worst(lambda *given: gradients.Normalise.apply(*given, 4, 1e-5, activate), plain, x, *parameters) < 0.005


@pytest.mark.parametrize("rows", [16, 1024], ids=["pieces", "whole"])
def test_a_feed_forward_layer_is_one(rows, monkeypatch):
    monkeypatch.setattr(gradients, "ROWS", rows)

    def plain(x: torch.Tensor, first: torch.Tensor, offset: torch.Tensor, last: torch.Tensor, bias: torch.Tensor):
        value, gate = functional.linear(x, first, offset).chunk(2, -1)
        return functional.linear(value * functional.gelu(gate), last, bias)

    given = drawn(2, 30, 16), drawn(128, 16, seed=1), drawn(128, seed=2), drawn(16, 64, seed=3), drawn(16, seed=4)
    assert worst(gradients.FeedForward.apply, plain, *given) < 0.008


def test_parameters_and_their_names_stay(everywhere):
    model = unet()
    names, parameters, weights = list(model.state_dict()), list(model.parameters()), copy.deepcopy(model.state_dict())
    speed_up(model)
    assert list(model.state_dict()) == names
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(one, weights[name]) for name, one in model.state_dict().items())
    kinds = {type(one) for one in model.modules()}
    assert {ours for _, ours, _ in kernels._LAYERS} <= kinds
    assert {type(one) for one in model.attn_processors.values()} == {kernels.Attend}


@pytest.mark.parametrize("linear", [False, True], ids=["convolutions", "linear layers"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("side", [20, 18])
def test_gradients_are_as_exact_as_torchs(side, checkpointing, linear, everywhere):
    """Errors are chance; over some batches those of a parameter are at most 1.1 of torch's, but for chance again."""
    plain, ours = unet(use_linear_projection=linear), unet(use_linear_projection=linear)
    exact = unet(FP32, use_linear_projection=linear)
    if checkpointing:
        ours.enable_gradient_checkpointing()
    speed_up(ours)
    squares: dict[str, list[float]] = {}
    for seed in range(6):
        expected = differentiate(exact, side, seed)
        for place, model in enumerate((plain, ours)):
            for name, one in differentiate(model, side, seed).items():
                squares.setdefault(name, [0, 0])[place] += (one.float() - expected[name]).square().sum().item()
    ratios = sorted((mine / torchs) ** 0.5 for torchs, mine in squares.values())
    assert len(ratios) == len(list(exact.parameters()))
    assert ratios[len(ratios) // 2] < 1.02
    assert ratios[len(ratios) * 9 // 10] < 1.1
    assert ratios[-1] < 1.3


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_gradients_are_the_same_bits_each_time(checkpointing, everywhere):
    models = [unet(), unet()]
    for model in models:
        if checkpointing:
            model.enable_gradient_checkpointing()
        speed_up(model)
    first, second = map(differentiate, models)
    assert all(one.isfinite().all() for one in first.values())
    assert_same(second, first)
    differentiate(models[0], 18)
    assert_same(differentiate(models[0]), first)


def test_checkpointing_changes_no_bit_and_makes_what_is_dear_once(everywhere, monkeypatch):
    plain, saving = unet(), unet()
    saving.enable_gradient_checkpointing()
    for model in (plain, saving):
        speed_up(model)
    expected, calls = differentiate(plain), []
    convolve = gradients._convolve
    monkeypatch.setattr(gradients, "_convolve", lambda *given: calls.append(1) or convolve(*given))
    run(plain)
    once = len(calls)
    assert_same(differentiate(saving), expected)
    assert len(calls) == 2 * once


def test_a_checkpoint_may_be_gone_through_again():
    layer, x = kernels.Convolution(3, 5, 3).bfloat16(), drawn(1, 3, 6, 6).to(BF16).requires_grad_()
    found = checkpointed(nn.Sequential(layer, nn.SiLU()), x).float().sum()
    first, second = (torch.autograd.grad(found, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_what_is_frozen_gets_no_gradient(everywhere):
    free, frozen = unet(), unet()
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("to_q" in name or name.endswith("norm.bias"))
    for model in (free, frozen):
        speed_up(model)
    expected = differentiate(free)
    found = differentiate(frozen)
    assert len(found) > 3
    assert_same(found, {name: expected[name] for name in found})
    with torch.no_grad():
        assert not run(free).requires_grad
    assert torch.equal(run(free).detach(), run(frozen).detach())


@pytest.mark.parametrize("before", [True, False], ids=["adapted before", "adapted after"])
def test_adapters_are_seen(before, everywhere):
    adapter = peft.LoraConfig(r=2, target_modules=["proj", "to_k", "net.2", "conv1"], init_lora_weights=False)
    plain, ours = unet(), unet()
    if before:
        torch.manual_seed(1)
        peft.inject_adapter_in_model(adapter, ours)
    speed_up(ours)
    if not before:
        torch.manual_seed(1)
        peft.inject_adapter_in_model(adapter, ours)
    torch.manual_seed(1)
    peft.inject_adapter_in_model(adapter, plain)
    expected, found = differentiate(plain), differentiate(ours)
    assert found.keys() == expected.keys()
    assert all(error(found[name], one.float()) < 0.3 for name, one in expected.items())


def test_float32_and_small_layers_are_left_to_torch():
    model = unet(FP32)
    kinds = [type(one) for one in model.modules()]
    expected = differentiate(model)
    speed_up(model)
    assert [type(one) for one in model.modules()] == kinds
    assert_same(differentiate(model), expected)
    layer = FeedForward(16, activation_fn="geglu").bfloat16()
    x = drawn(2, 5, 16).to(BF16)
    expected_rows = layer(x)
    layer.__class__ = kernels.FeedForward
    assert torch.equal(layer(x), expected_rows)
