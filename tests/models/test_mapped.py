"""Weights of safetensors files: every type and shape, converted, mapped, and given back without a change."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dbcap.errors import ModelError
from dbcap.models.mapped import SMALL, MappedWeights, trim

LARGE = SMALL // 4 + 1  # elements of float32


def resident_file_bytes() -> int:
    """Return how many bytes of files this process has in memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssFile:")[1].split()[0]) * 1024


@pytest.mark.parametrize(
    "kind",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        torch.bool,
    ],
    ids=str,
)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
def test_floating_point_numbers_become_what_is_wanted_and_others_stay(tmp_path, kind, wanted):
    few = torch.tensor([[0, 1, 3], [1, 0, 2]]).to(kind)
    many = torch.ones(4 * LARGE, dtype=torch.uint8).to(kind)
    save_file({"few": few, "many": many}, tmp_path / "w.safetensors")
    found = MappedWeights([tmp_path / "w.safetensors"]).tensors(wanted)
    assert sorted(found) == ["few", "many"]
    expected = wanted if kind.is_floating_point else kind
    assert found["few"].dtype == found["many"].dtype == expected
    assert found["few"].shape == (2, 3)
    assert torch.equal(found["few"], few.to(expected))
    assert torch.equal(found["many"], many.to(expected))


def test_tensors_as_they_are_stored(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(LARGE)}, tmp_path / "1.safetensors")
    save_file({"c": torch.ones(3, dtype=torch.float16)}, tmp_path / "2.safetensors")
    weights = MappedWeights([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    assert weights.names == ["a", "b", "c"]
    found = weights.stored({"b", "c", "none"})
    assert {name: tensor.dtype for name, tensor in found.items()} == {"b": torch.float32, "c": torch.float16}
    assert weights.tensors(torch.bfloat16).keys() == {"a", "b", "c"}
    assert all(tensor.eq(1).all() for tensor in found.values())


def test_several_files_scalars_and_empty_tensors(tmp_path):
    save_file({"scalar": torch.tensor(2.5), "none": torch.empty(0, 4)}, tmp_path / "1.safetensors")
    save_file({"row": torch.arange(4.0)}, tmp_path / "2.safetensors", metadata={"format": "pt"})
    found = MappedWeights([tmp_path / "1.safetensors", tmp_path / "2.safetensors"]).tensors(torch.float32)
    assert found["scalar"].shape == ()
    assert found["scalar"] == 2.5
    assert found["none"].shape == (0, 4)
    assert found["row"].tolist() == [0, 1, 2, 3]


def test_numbers_that_lie_at_odd_places_are_read_all_the_same(tmp_path):
    values = torch.arange(LARGE, dtype=torch.float32)
    entry = {"dtype": "F32", "shape": [LARGE], "data_offsets": [0, 4 * LARGE]}
    header = json.dumps({"row": entry}).encode()
    header += b" " * ((3 - len(header)) % 4)  # the numbers begin at 4 n + 3
    data = struct.pack("<Q", len(header)) + header + values.numpy().tobytes()
    (tmp_path / "w.safetensors").write_bytes(data)
    found = MappedWeights([tmp_path / "w.safetensors"]).tensors(torch.float32)
    assert torch.equal(found["row"], values)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux says how much of a file is in memory")
def test_release_gives_back_the_file_and_keeps_every_value(tmp_path):
    values = torch.arange(16 * LARGE, dtype=torch.float32)
    save_file({"row": values}, tmp_path / "w.safetensors")
    weights = MappedWeights([tmp_path / "w.safetensors"])
    row = weights.tensors(torch.float32)["row"]
    before = resident_file_bytes()
    assert torch.equal(row, values)
    read = resident_file_bytes()
    assert read - before > values.nbytes // 2, "it is mapped, and was read"
    weights.release()
    assert resident_file_bytes() - before < values.nbytes // 4
    assert torch.equal(row, values)


def test_what_is_mapped_outlives_the_name_of_its_file(tmp_path):
    values = torch.arange(LARGE, dtype=torch.float32)
    save_file({"row": values}, tmp_path / "w.safetensors")
    weights = MappedWeights([tmp_path / "w.safetensors"])
    row = weights.tensors(torch.float32)["row"]
    (tmp_path / "w.safetensors").unlink()
    weights.release()
    del weights
    trim()
    assert torch.equal(row, values)


def test_a_type_that_torch_has_not_is_named(tmp_path):
    header = json.dumps({"odd": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")
    with pytest.raises(ValueError, match="odd is stored as F4"):
        MappedWeights([tmp_path / "w.safetensors"]).tensors(torch.float32)


@pytest.mark.parametrize("data", [b"", b"\x10", b"\xff" * 64, struct.pack("<Q", 2) + b"{]"])
def test_damaged_files_are_refused(tmp_path, data):
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(Exception, match=r"(?i)header|empty|deserializ"):
        MappedWeights([tmp_path / "w.safetensors"])


@pytest.mark.parametrize("change", ["overwritten", "cut off", "renamed over", "removed"])
def test_a_file_that_is_written_to_is_seen_before_it_is_read(tmp_path, change):
    path, other = tmp_path / "w.safetensors", tmp_path / "other"
    save_file({"row": torch.ones(LARGE)}, path)
    save_file({"row": torch.zeros(LARGE)}, other)
    weights = MappedWeights([path])
    row = weights.tensors(torch.float32)["row"]
    weights.check()
    if change == "overwritten":
        path.write_bytes(other.read_bytes())
    elif change == "cut off":
        os.truncate(path, 0)
    elif change == "renamed over":
        other.rename(path)
    else:
        path.unlink()
    if change in ("overwritten", "cut off"):
        with pytest.raises(ModelError, match="was changed while it was in use; load the model again"):
            weights.check()
    else:
        weights.check()
        weights.release()
        assert (row == 1).all()


def test_of_a_file_that_was_converted_nothing_is_left_open(tmp_path):
    save_file({"row": torch.ones(LARGE)}, tmp_path / "w.safetensors")
    weights = MappedWeights([tmp_path / "w.safetensors"])
    row = weights.tensors(torch.bfloat16)["row"]
    os.truncate(tmp_path / "w.safetensors", 0)
    weights.check()
    assert (row == 1).all()
