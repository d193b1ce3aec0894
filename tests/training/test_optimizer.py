"""Float32 weights beside what the forward pass reads: torch's own steps, and nothing small is lost."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from dbcap.errors import DbcapError
from dbcap.training import optimizer
from dbcap.training.checkpoint import Folders
from dbcap.training.optimizer import DivergedError, MasterOptimizer, Weights, maker

NAMES = ["adamw", "adamw8bit", "adafactor"]
FORMATS = [torch.float32, torch.bfloat16]


def model() -> nn.ModuleDict:
    """Return layers of all kinds that there are: a convolution with its channels last, matrices, a norm."""
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, 3).to(memory_format=torch.channels_last)
    narrow = nn.Conv2d(8, 4, 1).to(memory_format=torch.channels_last)
    return nn.ModuleDict({"conv": conv, "narrow": narrow, "linear": nn.Linear(80, 70), "norm": nn.LayerNorm(70)})


def optimizing(module, name="adamw", dtype=torch.float32, *, accumulates=False, clip=0.0, lr=1e-2):
    weights = Weights(dict(module.named_parameters()), dtype, accumulates=accumulates)
    return MasterOptimizer(weights, maker(name, 0.01), lr=lr, clip=clip)


def give_gradients(module, step, size=1.0):
    """Give all weights gradients that are a function of the step."""
    random = torch.Generator().manual_seed(step)
    for one in module.parameters():
        drawn = size * torch.randn(one.shape, generator=random)
        one.grad = torch.empty_like(one).copy_(drawn)


def state(module) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in module.named_parameters()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert torch.equal(found[name], one), name


@pytest.mark.parametrize("piece", [7, 2**20])
@pytest.mark.parametrize("dtype", FORMATS)
def test_the_norm_is_that_of_all_gradients_together(piece, dtype, monkeypatch):
    monkeypatch.setattr(optimizer, "PIECE", piece)
    module = model()
    found = optimizing(module, dtype=dtype, lr=0.0)
    give_gradients(module, 1)
    whole = torch.cat([one.grad.double().flatten() for one in module.parameters()])
    found.step()
    assert found.norm == pytest.approx(float(whole.norm()), rel=1e-5)


# ---- torch's own steps


def test_in_float32_steps_are_those_of_adamw():
    ours, theirs = model(), model()
    found = optimizing(ours)
    expected = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.01, fused=True)
    for step in range(5):
        found.param_groups[0]["lr"] = expected.param_groups[0]["lr"] = 1e-2 / (step + 1)
        for module in (ours, theirs):
            give_gradients(module, step)
        found.step()
        expected.step()
        assert found.lr_used == 1e-2 / (step + 1)
    assert_equal(state(ours), state(theirs))


@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
def test_gradients_are_clipped_as_torch_does(size):
    ours, theirs = model(), model()
    found = optimizing(ours, clip=1.0)
    expected = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.01, fused=True)
    for step in range(3):
        for module in (ours, theirs):
            give_gradients(module, step, size * (step + 1))
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        expected.step()
        found.step()
        assert found.norm == pytest.approx(norm.item(), rel=1e-6)
    for name, one in state(theirs).items():
        torch.testing.assert_close(state(ours)[name], one, rtol=1e-5, atol=1e-6)


def test_without_a_clip_long_gradients_stay():
    ours, theirs = model(), model()
    found = optimizing(ours, "adafactor", clip=0.0)
    expected = torch.optim.Adafactor(theirs.parameters(), lr=1e-2, weight_decay=0.01)
    for module in (ours, theirs):
        give_gradients(module, 0, 100)
    found.step()
    expected.step()
    assert_equal(state(ours), state(theirs))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_chunks_change_nothing(name, dtype, monkeypatch):
    """A chunk is stepped at a time, so that float32 gradients of the others do not exist yet, or no longer."""
    whole = model()
    one = optimizing(whole, name, dtype)
    monkeypatch.setattr(optimizer, "CHUNK", 5000)
    parts = model()
    other = optimizing(parts, name, dtype)
    held = []
    for inner in other._inner:
        inner.register_step_pre_hook(
            lambda *_: held.append([key for key, master in other.weights.masters.items() if master.grad is not None])
        )
    for step in range(2):
        for module, stepped in ((whole, one), (parts, other)):
            give_gradients(module, step)
            stepped.step()
    assert_equal(other.weights.state(), one.weights.state())
    assert_equal(state(parts), state(whole))
    groups = [["conv.weight"], ["conv.bias", "narrow.weight", "narrow.bias"], ["linear.weight"]]
    assert held[:3] == groups if dtype == torch.bfloat16 else len(held) == 8
    assert other.weights.gradients() == {}


# ---- less than float32


def test_updates_too_small_for_bfloat16_are_not_lost():
    module = nn.ParameterDict({"w": nn.Parameter(torch.ones(5))})
    found = optimizing(module, dtype=torch.bfloat16, lr=1e-5)
    plain = torch.ones(5, dtype=torch.bfloat16)
    for _ in range(1000):
        module["w"].grad = torch.ones(5, dtype=torch.bfloat16)
        found.step()
        plain -= 1e-5
    assert plain.tolist() == [1.0] * 5, "bfloat16 alone does not move"
    (master,) = found.weights.state().values()
    assert master.tolist() == pytest.approx([1 - 1000 * 1e-5 * 1.01] * 5, abs=1e-4)
    assert module["w"].dtype == torch.bfloat16
    assert torch.equal(module["w"].detach(), master.bfloat16())


@pytest.mark.parametrize("name", NAMES)
def test_working_copies_are_the_rounded_weights(name):
    module = model()
    before = state(module)
    found = optimizing(module, name, torch.bfloat16)
    assert_equal(found.weights.state(), before)
    give_gradients(module, 0)
    found.step()
    masters = found.weights.state()
    assert {one.dtype for one in masters.values()} == {torch.float32}
    assert_equal(state(module), {key: one.bfloat16() for key, one in masters.items()})
    assert not torch.equal(masters["linear.weight"], masters["linear.weight"].bfloat16().float())
    conv = module["conv"].weight
    assert conv.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", FORMATS)
def test_gradients_of_many_micro_batches_are_summed_in_float32(dtype):
    """In bfloat16 a sum of 1000 ones is 256."""
    module = nn.ParameterDict({"w": nn.Parameter(torch.ones(3))})
    found = optimizing(module, dtype=dtype, accumulates=True)
    for _ in range(1000):
        module["w"].sum().backward()
    (gradient,) = found.weights.gradients().values()
    assert (gradient.dtype, gradient.tolist()) == (torch.float32, [1000.0] * 3)
    found.step()
    assert found.norm == pytest.approx(1000 * 3**0.5)
    assert found.weights.gradients() == {}
    module["w"].sum().backward()
    found.zero_grad()
    assert found.weights.gradients() == {}


# ---- what is not a number


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_gradient_that_is_no_number_changes_nothing(dtype, bad):
    module = model()
    found = optimizing(module, dtype=dtype, clip=1.0)
    give_gradients(module, 0)
    found.step()
    before = state(module), found.weights.state(), copy.deepcopy(found.state_dict())
    masters = {name: one.clone() for name, one in before[1].items()}
    give_gradients(module, 1)
    module["norm"].bias.grad[3] = bad
    with pytest.raises(DivergedError, match="the gradient is not finite"):
        found.step()
    assert_equal(state(module), before[0])
    assert_equal(found.weights.state(), masters)
    after = found.state_dict()["state"]
    for name, remembered in before[2]["state"].items():
        assert_equal(after[name], remembered)


# ---- state


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_out_of_a_file_it_goes_on_to_the_same_bits(name, dtype, tmp_path):
    module = model()
    found = optimizing(module, name, dtype, clip=1.0)
    for step in range(3):
        give_gradients(module, step)
        found.step()
    Folders().save_checkpoint(
        {"state_dict": found.weights.state(), "optimizer_states": [found.state_dict()]}, tmp_path / "000003"
    )
    for step in range(3, 5):
        give_gradients(module, step)
        found.step()
    again = model()
    resumed = optimizing(again, name, dtype, clip=1.0)
    read = Folders().load_checkpoint(tmp_path / "000003")
    resumed.weights.load(read["state_dict"])
    resumed.load_state_dict(read["optimizer_states"][0])
    for remembered in resumed._inner[0].state.values():
        for one in remembered.values():
            assert not isinstance(one, torch.Tensor) or one.untyped_storage().nbytes() == one.nbytes, "of the file"
    for step in range(3, 5):
        give_gradients(again, step)
        resumed.step()
    assert_equal(resumed.weights.state(), found.weights.state())
    assert_equal(state(again), state(module))
    assert resumed.norm == found.norm


def test_weights_of_another_model_are_refused():
    weights = optimizing(model()).weights
    other = {name: one for name, one in weights.state().items() if name != "norm.bias"}
    with pytest.raises(DbcapError, match=r"^the checkpoint does not belong to this model: norm\.bias; choose another"):
        weights.load(other)


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(DbcapError) as failure:
        maker("adamw8bit", 0.01)
    assert str(failure.value) == "--optimizer adamw8bit needs bitsandbytes; run `pip install 'dbcap[bnb]'`"
