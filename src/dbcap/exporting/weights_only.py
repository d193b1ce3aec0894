"""Weights of a diffusion model's graphs as int8, all else in float32: no row depends on another one.

A product's and a convolution's weight is symmetric with one scale an output channel, behind a `DequantizeLinear`:
ONNX Runtime makes one `MatMulNBits` of that and a product as it loads it, and of a convolution's it makes float32
numbers for the time of the convolution. Of the table of tokens only the rows that are looked up are multiplied out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from dbcap.exporting.quantise import Share, constant, per_column, replace, table_of, tidy

_OUTPUTS = {"MatMul": 1, "Conv": 0}
"""Which axis of a weight is the outputs'."""
_WITH_WEIGHTS = (*_OUTPUTS, "Gemm", "Gather")
"""What multiplies by weights or looks tokens up; `Gemm` does not come out of linear layers here."""
_MULTIPLY = ("MatMul", "Conv", "Gemm", "Gather")
"""What has weights."""

Array = npt.NDArray[Any]


def quantise(model: ir.Model) -> Share:
    """Quantise the products, convolutions and lookups of tokens of a graph, in place."""
    graph = model.graph
    before = _weights(graph)
    whole: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        weight = _weight_of(node)
        if weight is None:
            continue
        if node.op_type == "Gather":
            replace(graph, node, _lookup(graph, node.inputs[1], weight))
        elif node.op_type in _OUTPUTS:
            if weight not in whole:
                made = _dequantised(graph, weight, _OUTPUTS[node.op_type])
                graph.insert_before(node, made)
                whole[weight] = made.outputs[0]
            node.replace_input_with(1, whole[weight])
    tidy(model)
    left = before & _weights(graph)
    return Share(_size(before), _size(before - left))


def by_output(weight: Array, axis: int) -> tuple[Array, Array]:
    """Return a weight as int8 from -127 to 127, and the scale of each place on an axis."""
    moved = np.moveaxis(weight, axis, -1)
    integers, scales = per_column(moved.reshape(-1, weight.shape[axis]))
    return np.ascontiguousarray(np.moveaxis(integers.reshape(moved.shape), -1, axis)), scales


def _dequantised(graph: ir.Graph, weight: ir.Value, axis: int) -> ir.Node:
    integers, scales = by_output(_array(weight), axis)
    name = str(weight.name)
    pair = [constant(graph, f"{name}_int8", integers), constant(graph, f"{name}_scale", scales)]
    node = ir.node("DequantizeLinear", pair, {"axis": axis}, name=f"{name}_dequantise")
    made: Any = node.outputs[0]
    made.name, made.shape, made.dtype = f"{name}_whole", weight.shape, ir.DataType.FLOAT
    return node


def _lookup(graph: ir.Graph, tokens: ir.Value | None, table: ir.Value) -> list[ir.Node]:
    """Return the nodes that look rows of tokens (B, T) up in a table (V, C): -> (B, T, C)."""
    integers, scales = by_output(_array(table), 0)
    name = str(table.name)
    rows = ir.node("Gather", [constant(graph, f"{name}_int8", integers), tokens], {"axis": 0})
    numbers = ir.node("Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT})
    scale = ir.node("Gather", [constant(graph, f"{name}_scale", scales[:, None]), tokens], {"axis": 0})
    return [rows, numbers, scale, ir.node("Mul", [numbers.outputs[0], scale.outputs[0]])]


def _weight_of(node: ir.Node) -> ir.Value | None:
    """Return what a node multiplies by or looks tokens up in, where that is a constant in float32."""
    if node.op_type not in _MULTIPLY:
        return None
    value = table_of(node) if node.op_type == "Gather" else node.inputs[1]
    if value is None or not value.is_initializer() or value.dtype != ir.DataType.FLOAT:
        return None
    return value if len(value.shape or ()) > 1 else None


def _weights(graph: ir.Graph) -> set[ir.Value]:
    return {value for node in graph if (value := _weight_of(node)) is not None}


def _size(values: set[ir.Value]) -> int:
    return sum(_array(value).size for value in values)


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()
