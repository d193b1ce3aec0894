"""What bitsandbytes packed is unpacked as bitsandbytes itself does, and a damaged state is one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import save_file

from dbcap.models import bnb
from dbcap.models.layout import count_in
from dbcap.models.mapped import MappedWeights

STATE = "layer.weight.quant_state.bitsandbytes__nf4"


def matrix(outputs: int, inputs: int) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))


def in_4(weight: torch.Tensor, **how) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the tensors that a checkpoint has of a weight, and what bitsandbytes makes of them."""
    packed, state = functional.quantize_4bit(weight, **{"quant_type": "nf4", "compress_statistics": True, **how})
    tensors = {f"layer.weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    tensors |= {"layer.weight": packed, "layer.bias": torch.ones(len(weight)) / 3}
    # In one row, since its kernel for CPUs is wrong where rows end within a block.
    shape, state.shape = state.shape, torch.Size((1, weight.numel()))
    return tensors, functional.dequantize_4bit(packed, state).view(shape)


def in_8(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    integers, largest, _ = functional.int8_vectorwise_quant(weight.half())
    tensors = {
        "layer.weight": integers,
        "layer.SCB": largest,
        "layer.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, functional.int8_vectorwise_dequant(integers, largest)


def unpacked(tensors: dict[str, torch.Tensor], folder: Path, dtype=torch.float32, transposed=()):
    save_file(tensors, folder / "w.safetensors")
    return bnb.unpacked(MappedWeights([folder / "w.safetensors"]), dtype, transposed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("twice", [True, False], ids=["scales in 8 bits", "scales as they are"])
@pytest.mark.parametrize("shape", [(96, 128), (30, 33), (7, 5)], ids=str)
def test_4_bits_are_what_bitsandbytes_makes_of_them(tmp_path, dtype, kind, twice, shape):
    tensors, expected = in_4(matrix(*shape).to(dtype), quant_type=kind, compress_statistics=twice)
    found = unpacked(tensors, tmp_path)
    assert sorted(found) == ["layer.bias", "layer.weight"]
    assert torch.equal(found["layer.weight"], expected.float())
    assert (found["layer.weight"] - matrix(*shape)).abs().max() < 0.75


def test_numbers_and_scales_are_rounded_after_unpacking(tmp_path):
    for tensors, expected in (in_4(matrix(64, 64), blocksize=128), in_8(matrix(64, 64))):
        found = unpacked(tensors, tmp_path, torch.bfloat16)
        assert torch.equal(found["layer.weight"], expected.bfloat16())
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_bytes_may_be_stored_as_other_numbers(tmp_path):
    tensors, expected = in_4(matrix(32, 64), quant_storage=torch.bfloat16)
    assert tensors["layer.weight"].dtype == torch.bfloat16
    assert torch.equal(unpacked(tensors, tmp_path)["layer.weight"], expected)
    assert count_in([tmp_path / "w.safetensors"]) == 32 * 64 + 32


def test_8_bits_are_what_bitsandbytes_makes_of_them(tmp_path):
    tensors, expected = in_8(matrix(30, 33))
    found = unpacked(tensors, tmp_path)
    assert list(found) == ["layer.weight"]
    assert torch.equal(found["layer.weight"], expected)
    assert (expected - matrix(30, 33)).abs().max() < 0.02


@pytest.mark.parametrize("pack", [in_4, in_8])
def test_matrices_of_other_order_are_turned(tmp_path, pack):
    tensors, expected = pack(matrix(64, 32))
    found = unpacked(tensors, tmp_path, transposed={"layer.weight"})["layer.weight"]
    assert torch.equal(found, expected.T)
    assert found.is_contiguous()
    assert count_in([tmp_path / "w.safetensors"]) == 64 * 32 + (64 if pack is in_4 else 0)


# ---- damage


def told(tensors: dict[str, torch.Tensor], **changes) -> dict[str, torch.Tensor]:
    numbers = json.loads(bytes(tensors[STATE].tolist())) | changes
    return tensors | {STATE: torch.tensor(list(json.dumps(numbers).encode()), dtype=torch.uint8)}


DAMAGE = {
    "no scales": lambda t: {name: one for name, one in t.items() if name != "layer.weight.absmax"},
    "no map": lambda t: {name: one for name, one in t.items() if name != "layer.weight.quant_map"},
    "short map": lambda t: t | {"layer.weight.quant_map": t["layer.weight.quant_map"][:9].clone()},
    "few scales": lambda t: t | {"layer.weight.absmax": t["layer.weight.absmax"][:-1].clone()},
    "no weight": lambda t: {name: one for name, one in t.items() if name != "layer.weight"},
    "no JSON": lambda t: t | {STATE: torch.tensor(list(b"{"), dtype=torch.uint8)},
    "no object": lambda t: t | {STATE: torch.tensor(list(b"[]"), dtype=torch.uint8)},
    "another shape": lambda t: told(t, shape=[64, 65]),
    "less than no shape": lambda t: told(t, shape=[-1, 64]),
    "no block": lambda t: told(t, blocksize=0),
    "no number format": lambda t: told(t, dtype="nn"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_state_is_one_line(tmp_path, damage):
    tensors, _ = in_4(matrix(64, 64))
    with pytest.raises(ValueError, match=r"^the bitsandbytes state of layer\.weight is damaged$"):
        unpacked(damage(tensors), tmp_path)


def test_damage_of_8_bits_is_one_line(tmp_path):
    tensors, _ = in_8(matrix(64, 64))
    for change in ({"layer.SCB": torch.ones(9)}, {"layer.weight_format": torch.tensor(2, dtype=torch.uint8)}):
        with pytest.raises(ValueError, match=r"^the bitsandbytes state of layer\.weight is damaged$"):
            unpacked(tensors | change, tmp_path)
    with pytest.raises(ValueError, match=r"layer\.weight is packed and has no bitsandbytes state"):
        unpacked({"layer.weight": tensors["layer.weight"]}, tmp_path)


def test_only_bitsandbytes_is_read():
    assert not bnb.is_packed(SimpleNamespace())
    assert bnb.is_packed(SimpleNamespace(quantization_config={"quant_method": "bitsandbytes"}))
    for method in ("gptq", None):
        with pytest.raises(ValueError, match=f"quantised by {method}, and dbcap reads what bitsandbytes made"):
            bnb.is_packed(SimpleNamespace(quantization_config={"quant_method": method}))
