"""What a run will take, said before it begins."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dbcap.config.training import TrainConfig
from dbcap.models import cpu
from dbcap.models.identity import Identity
from dbcap.training import preflight, trainee
from dbcap.training.data import Data, Drawing, Shown
from dbcap.training.latents import Latent

SHOWN = Shown((Latent(torch.zeros(4, 8, 8), torch.ones(4, 8, 8)),), 0)


def made(family, dtype=torch.float32, shown=SHOWN, **settings):
    """Return what is trained, the data of a run, and its settings."""
    config = TrainConfig(data=("d",), **settings)
    text = config.train_text_encoder
    how = trainee.How(text, False, config.accumulate > 1, dtype, config.gradient_checkpointing == "on")
    found = trainee.make(family, ["a dog"], 32, how, config, Identity("sks", "dog"))
    data = Data([shown], [shown], Drawing(0, config.batch_size, 1000, 0.0), accumulate=1, workers=0)
    return found, data, config


@pytest.fixture
def work(family, tiny_diffusion):
    """Return a function that counts what a micro-batch takes."""

    def call(model=tiny_diffusion, **settings):
        found, data, config = made(family(model), **settings)
        return preflight.forward_pass(found, data, config.batch_size)

    return call


def test_the_denoisers_arithmetic_is_counted(work, family, tiny_diffusion):
    unet = family(tiny_diffusion).module("unet", torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(torch.zeros(2, 4, 8, 8), torch.zeros(2), encoder_hidden_states=torch.zeros(2, 16, 32))
    forward = counter.get_total_flops()
    assert work().operations == pytest.approx(3 * forward, rel=0.03)
    assert work(gradient_checkpointing="on").operations == pytest.approx(4 * forward, rel=0.03)
    assert work(batch_size=2).operations == pytest.approx(3 * 2 * forward, rel=0.03)


def test_what_the_backward_pass_needs_is_counted(work, family, tiny_diffusion):
    unet = family(tiny_diffusion).module("unet", torch.float32).requires_grad_(True)
    kept, own = {}, {one.untyped_storage().data_ptr() for one in unet.parameters()}

    def keep(one):
        kept[one.untyped_storage().data_ptr()] = one
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        unet(torch.zeros(2, 4, 8, 8), torch.zeros(2), encoder_hidden_states=torch.zeros(2, 16, 32))
    bytes_kept = sum(one.untyped_storage().nbytes() for place, one in kept.items() if place not in own)
    assert work().memory == pytest.approx(bytes_kept, rel=0.05)
    assert work(batch_size=4).memory == pytest.approx(4 * work().memory, rel=0.05)
    assert work(gradient_checkpointing="on").memory == pytest.approx(preflight.CHECKPOINTED * work().memory, rel=0.01)


@pytest.mark.parametrize("cpu_class", ["amx", "avx512-bf16"])
def test_it_is_counted_with_the_operators_of_every_cpu(cpu_class, family, tiny_diffusion, monkeypatch):
    monkeypatch.setattr(cpu, "cpu_class", lambda: cpu_class)
    large = Shown((Latent(torch.zeros(4, 32, 32), torch.ones(4, 32, 32)),), 0)
    counted = {}
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        found, data, config = made(family(tiny_diffusion, name), dtype, large)
        counted[dtype] = preflight.forward_pass(found, data, config.batch_size)
    plain, ours = counted.values()
    assert 0.6 < ours.operations / plain.operations < 1.1
    assert ours.memory < plain.memory


def test_estimating_touches_nothing(work, family, tiny_diffusion, tiny_xl):
    found, data, config = made(family(tiny_diffusion), gradient_checkpointing="on")
    before = {name: (one.data_ptr(), one.clone()) for name, one in found.unet.named_parameters()}
    preflight.forward_pass(found, data, config.batch_size)
    for name, one in found.unet.named_parameters():
        assert one.data_ptr() == before[name][0]
        assert one.equal(before[name][1])
        assert one.grad is None
    assert found.unet.is_gradient_checkpointing
    assert work(tiny_xl).operations > 0


@pytest.mark.parametrize(
    ("dtype", "settings", "a_weight"),
    [
        (torch.float32, {}, 4 + 4 + 8),  # weight, gradient, optimizer
        (torch.float32, {"ema": True, "optimizer": "adamw8bit"}, 4 + 4 + 2.06 + 4),
        (torch.bfloat16, {}, 2 + 4 + 2 + 8),  # with float32 weights beside
        (torch.bfloat16, {"accumulate": 2}, 2 + 4 + 4 + 8),
    ],
)
def test_memory_is_that_of_weights_gradients_and_optimizer(dtype, settings, a_weight, family, tiny_diffusion):
    found, _, config = made(family(tiny_diffusion), dtype, **settings)
    trained = sum(one.numel() for one in found.weights.masters.values())
    assert trained == sum(
        one.numel() for one in (*found.unet.parameters(), *found.encoders["text_encoder"].parameters())
    )
    module = SimpleNamespace(trainee=found)
    assert preflight.memory_bytes(module, config, trained) == pytest.approx(trained * a_weight, rel=1e-6)


def test_what_is_said(training, monkeypatch):
    monkeypatch.setattr(preflight, "forward_pass", lambda *_: preflight.Work(3600.0, 2_000_000))
    monkeypatch.setattr(preflight, "speed", lambda *_: 1.0)
    result = training(*training.words("rex", "--max-time", "0s", "--steps", "3"))
    line = result.err.splitlines()[0]
    assert re.sub(r"\d\.\d MB", "x MB", line) == (
        "rex: 1.0 M weights are trained; about 1x MB of memory, 5x MB of disk at most, 3.0 hours for 3 steps"
    )
    assert "2.0 hours for 2 steps" in training("resume", "--max-time", "0s").err


def test_how_fast_this_machine_is():
    found = preflight.speed(torch.float32, torch.device("cpu"))
    assert 1e8 < found < 1e15


@pytest.mark.parametrize(
    ("minutes", "said"), [(0.1, "1 minute"), (7.4, "7 minutes"), (89, "89 minutes"), (90, "1.5 hours")]
)
def test_times(minutes, said):
    assert preflight._about(minutes) == said
