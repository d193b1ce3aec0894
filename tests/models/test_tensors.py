"""Files of tensors that are the same to the byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load

from dbcap.models.tensors import save_file

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(header=st.dictionaries(TEXT, TEXT, min_size=2, max_size=6))
def test_a_header_is_written_in_order(header, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.uint8)}
    written = set()
    for number, said in enumerate([header, dict(reversed(header.items())), header]):
        path = folder / f"{number}.safetensors"
        save_file(tensors, path, said)
        written.add(path.read_bytes())
    assert len(written) == 1
    with safe_open(path, "pt") as file:
        assert file.metadata() == header
    found = load(path.read_bytes())
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], one) for name, one in tensors.items())


@pytest.mark.parametrize("header", [None, {}, {"format": "pt"}])
def test_without_much_of_a_header(header, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", header)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == (header or None)


def test_views_and_tensors_that_share_memory_are_written_whole(tmp_path):
    one = torch.arange(24.0).view(2, 3, 2, 2)
    tensors = {"one": one, "same": one, "part": one[0], "last": one.contiguous(memory_format=torch.channels_last)}
    save_file(tensors, tmp_path / "a.safetensors")
    found = load((tmp_path / "a.safetensors").read_bytes())
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_others_may_read_the_file_as_any_other_new_one(tmp_path):
    (tmp_path / "other").touch()
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
