"""Weights as int8 with one scale an output: how far off they are, and what is left as it is."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference

from dbcap.exporting import onnx_file, weights_only
from dbcap.exporting.quantise import Share

DRAWN = np.random.default_rng(0)
WEIGHTS = {
    "table": DRAWN.standard_normal((50, 12), np.float32),
    "matrix": DRAWN.standard_normal((12, 8), np.float32),
    "kernel": DRAWN.standard_normal((6, 1, 1, 3), np.float32),
    "bias": np.ones(8, np.float32),
}


@pytest.fixture
def model():
    """Tokens looked up, multiplied twice by one matrix, and a convolution of that."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("MatMul", ["rows", "matrix"], ["first"]),
        helper.make_node("Add", ["first", "bias"], ["biased"]),
        helper.make_node("MatMul", ["rows", "matrix"], ["second"]),
        helper.make_node("Mul", ["biased", "second"], ["both"]),
        helper.make_node("Unsqueeze", ["both", "axis"], ["picture"]),
        helper.make_node("Conv", ["picture", "kernel"], ["y"], pads=[0, 1, 0, 1]),
    ]
    ends = (("input_ids", TensorProto.INT64, ["B", "T"]), ("y", TensorProto.FLOAT, ["B", 6, "T", 8]))
    values = [helper.make_tensor_value_info(*end) for end in ends]
    arrays = {**WEIGHTS, "axis": np.array([1])}
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], initializers)
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.from_proto(shape_inference.infer_shapes(whole))


def ran(model, path, tokens):
    onnx_file.save(model, path)
    return onnxruntime.InferenceSession(path).run(None, {"input_ids": tokens})[0]


@pytest.mark.parametrize("axis", [0, 1])
def test_a_scale_for_each_output(axis):
    weight = WEIGHTS["kernel"] if axis == 0 else WEIGHTS["matrix"]
    integers, scales = weights_only.by_output(weight, axis)
    assert (integers.dtype, integers.shape, scales.shape) == (np.int8, weight.shape, (weight.shape[axis],))
    shape = [1] * weight.ndim
    shape[axis] = -1
    off = np.abs(integers * scales.reshape(shape) - weight)
    assert (off <= scales.reshape(shape) / 2 + 1e-7).all()


def test_products_convolutions_and_the_lookup_are_quantised(model, tmp_path):
    tokens = np.array([[3, 7, 49], [0, 3, 3]])
    before = ran(model, tmp_path / "before.onnx", tokens)
    count = sum(WEIGHTS[name].size for name in ("table", "matrix", "kernel"))
    assert weights_only.quantise(model) == Share(count, count)
    assert sorted(model.graph.initializers) == sorted(
        ["axis", "bias", *(f"{name}_{what}" for name in ("kernel", "matrix", "table") for what in ("int8", "scale"))]
    )
    after = ran(model, tmp_path / "after.onnx", tokens)
    assert np.abs(after - before).max() < 0.05 * np.abs(before).max()
    assert np.array_equal(after[:1], ran(model, tmp_path / "after.onnx", tokens[:1])), "no row depends on another"
