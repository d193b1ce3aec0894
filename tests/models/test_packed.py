"""Packed layers multiply as plain ones do, in every precision, with and without packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from dbcap.models import packed
from dbcap.models.packed import FUSED, Linear, can_pack, pack_linears

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["", *FUSED, "quick_gelu", "silu"]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 1, shape)).to(dtype)


@pytest.fixture(params=["packed", "plain"])
def packing(request, monkeypatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(packed, "can_pack", lambda _: False)
    return str(request.param)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda name: name or "none")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_gives_what_the_plain_one_gives(dtype, activation, bias, packing):
    weight, offset = drawn(48, 64, dtype=dtype, seed=1), drawn(48, dtype=dtype, seed=2) if bias else None
    if packing == "packed" and not can_pack(weight):
        pytest.skip(f"this machine packs no {dtype}")
    layer = Linear(weight, offset, activation)
    for shape in ((1, 64), (2, 64), (33, 64), (2, 5, 64)):
        x = drawn(*shape, dtype=dtype, seed=3)
        exact = functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
        exact = ACT2FN[activation](exact) if activation else exact
        found = layer(x)
        assert found.dtype == dtype
        assert found.shape == exact.shape
        # the sums are as large as 30: one rounding of them, and one of what an activation makes of it
        spacing = torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), exact, rtol=2 * spacing, atol=40 * spacing)
        if not activation:
            torch.testing.assert_close(found, functional.linear(x, weight, offset), rtol=2 * spacing, atol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype, packing):
    layer = Linear(drawn(48, 64, dtype=dtype), drawn(48, dtype=dtype), "gelu_new")
    x = drawn(8, 64, dtype=dtype, seed=1)
    order = [5, 0, 7, 7, 2, 1, 3, 6]
    assert torch.equal(layer(x[order]), layer(x)[order])


def test_what_cannot_be_packed_is_left_as_it_is():
    assert not can_pack(torch.zeros(4, 4, dtype=torch.float64))
    assert not can_pack(torch.zeros(4, 4, device="meta"))
    weight = drawn(4, 4, dtype=torch.float64)
    torch.testing.assert_close(Linear(weight, None, "relu")(weight), (weight @ weight.T).relu())


def test_a_layer_shares_no_memory_with_a_packed_weight():
    weight = drawn(48, 64)
    layer = Linear(weight, None)
    before = layer(drawn(2, 64))
    if can_pack(weight):
        weight.zero_()
        assert torch.equal(layer(drawn(2, 64)), before)
    assert not layer(drawn(2, 64)).requires_grad
    assert not Linear(nn.Parameter(weight), nn.Parameter(drawn(48)))(drawn(2, 64)).requires_grad


def test_all_linear_layers_of_a_module_are_replaced():
    class Other(nn.Linear):
        """Whose owner may read its weight."""

    module = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.GELU(), nn.Linear(8, 4, bias=False)), Other(4, 4))
    x = drawn(3, 8)
    with torch.inference_mode():
        before = module(x)
        released = []
        pack_linears(module, lambda: released.append(1))
        torch.testing.assert_close(module(x), before, rtol=1e-5, atol=1e-6)
    kinds = [type(layer) for layer in module.modules()]
    assert nn.Linear not in kinds
    assert kinds.count(Linear) == 2
    assert kinds.count(Other) == 1
    assert len(released) == 2, "each layer gives back what was read for it"
