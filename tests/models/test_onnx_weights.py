"""Weights of ONNX files are counted by headers, inside the file or beside it, and damage is one line."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dbcap.errors import ModelError
from dbcap.models.onnx_weights import count


@pytest.fixture
def model():
    """Three weights: 1200 numbers, 300, and one."""
    arrays = {"a": np.ones((30, 40), np.float32), "b": np.ones((3, 100), np.int8), "c": np.array(5)}
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B"])
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    other = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B"])
    return helper.make_model(helper.make_graph(nodes, "g", [value], [other], weights))


@pytest.mark.parametrize("beside", [False, True])
def test_all_weights_are_counted(model, tmp_path, beside):
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=beside, location="m.onnx_data", size_threshold=100)
    assert (tmp_path / "m.onnx_data").is_file() == beside
    assert count([tmp_path / "m.onnx", tmp_path / "m.onnx"]) == 2 * 1501


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\x3a\xff\xff\xff\x0fab", b"\x3a"])
def test_damage_is_one_line(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.onnx is damaged"):
        count([tmp_path / "m.onnx"])
