"""What is written weight by weight is the file that protobuf would have written of the same graph."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from dbcap.exporting import onnx_file


def model_with(*arrays):
    x = ir.Value(name="x", shape=ir.Shape([None]), type=ir.TensorType(ir.DataType.FLOAT))
    weights = [ir.Value(name=f"w{number}", const_value=ir.tensor(array)) for number, array in enumerate(arrays)]
    node = ir.node("Identity", [x])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=weights, opset_imports={"": 20}, name="g")
    node.outputs[0].name = "y"
    node.outputs[0].shape, node.outputs[0].type = x.shape, x.type
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(
    "arrays",
    [
        (),
        (np.arange(3, dtype=np.float32),),
        (np.zeros((0, 4), np.float32), np.array(5), np.full((40, 50), 7, np.int8), np.ones(20_000, np.float16)),
    ],
    ids=["none", "one", "of many kinds"],
)
def test_graph_and_weights_come_back(tmp_path, arrays):
    released = []
    onnx_file.save(model_with(*arrays), tmp_path / "m.onnx", lambda: released.append(1))
    read = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(read)
    assert [node.op_type for node in read.graph.node] == ["Identity"]
    back = {weight.name: onnx.numpy_helper.to_array(weight) for weight in read.graph.initializer}
    assert list(back) == [f"w{number}" for number in range(len(arrays))]
    for number, array in enumerate(arrays):
        assert back[f"w{number}"].dtype == array.dtype
        assert np.array_equal(back[f"w{number}"], array)
    assert len(released) == len(arrays)


def test_more_than_protobuf_takes_goes_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "LARGEST", 100_000)
    arrays, released = (np.arange(40_000, dtype=np.float32), np.array(5)), []
    onnx_file.save(model_with(*arrays), tmp_path / "m.onnx", lambda: released.append(1))
    assert (tmp_path / "m.onnx_data").stat().st_size >= arrays[0].nbytes > (tmp_path / "m.onnx").stat().st_size
    back = [onnx.numpy_helper.to_array(weight) for weight in onnx.load(tmp_path / "m.onnx").graph.initializer]
    assert all(np.array_equal(one, other) for one, other in zip(back, arrays, strict=True))
    assert released
