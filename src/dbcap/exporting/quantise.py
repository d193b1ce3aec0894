"""Weights of ONNX graphs in 8 or 4 bits, each half of a captioner by the scheme that suits it.

The encoder multiplies hundreds of rows at once: 8-bit integers on both sides (`MatMulInteger`), the weights symmetric
with one scale a column, the rows quantised as they come, or with `calibrated` ranges that are known beforehand. The
decoder multiplies few rows, so it is bound by the weights it reads: they alone are quantised, in blocks with one scale
each (`MatMulNBits`), which makes a row independent of the others. The table of embeddings is that of the output layer,
kept once: a token's row is looked up in its blocks and multiplied out.

K inputs, N outputs, V tokens, C width. Raises nothing: what is left out shows in `share`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

BLOCK = 128
"""Weights that share a scale; fewer where a matrix has fewer inputs."""
TABLE_BLOCK_OF_4 = 32
"""The same for a table of embeddings in 4 bits, of which all that is said depends twice."""
SMALLEST_BLOCK = 16
ACCURACY = 4
"""Rows are quantised to 8 bits block by block; level 0 is a hundred times slower with weights in 8 bits."""
MICROSOFT = "com.microsoft"
LEAST_SHARE = 0.95

Array = npt.NDArray[Any]
Ranges = Mapping[str, tuple[float, float]]
"""Name of a value -> its least and greatest number."""


@dataclass(frozen=True)
class Share:
    """Numbers in the matrices and tables of a part, and how many of them were quantised."""

    weights: int
    quantised: int

    @property
    def of_all(self) -> float:
        """From 0 to 1."""
        return self.quantised / self.weights if self.weights else 0.0


def encoder(model: ir.Model, ranges: Ranges | None = None) -> Share:
    """Quantise the products of an encoder, in place; with `ranges` of what is multiplied the quantising is static."""
    graph, weights = model.graph, _weights(model.graph)
    rows: dict[ir.Value, tuple[ir.Value, ...]] = {}  # rows that several products share are quantised once
    for node in products(graph):
        x, weight = node.inputs
        assert x is not None
        assert weight is not None
        before: list[ir.Node] = []
        if x not in rows:
            made = _calibrated(graph, x, ranges[x.name or ""]) if ranges is not None else _dynamic(x)
            before, rows[x] = [made[0]], made[1]
        quantised, scale, zero = rows[x]
        integers, scales = per_column(weight.const_value.numpy())  # type: ignore[union-attr]
        name = str(weight.name)
        product = ir.node("MatMulInteger", [quantised, constant(graph, f"{name}_int8", integers), zero])
        cast = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT})
        both = ir.node("Mul", [scale, constant(graph, f"{name}_scale", scales)])
        result = ir.node("Mul", [cast.outputs[0], both.outputs[0]])
        replace(graph, node, [*before, product, cast, both, result])
    tidy(model)
    return Share(weights, weights - _weights(graph))


def decoder(model: ir.Model, bits: int) -> Share:
    """Quantise the products, the output layer and the lookup of tokens of a decoder, in place, to 8 or 4 bits."""
    graph, weights = model.graph, _weights(model.graph)
    model.opset_imports[MICROSOFT] = 1
    tables: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for node in products(graph):
        x, weight = node.inputs
        assert weight is not None
        assert weight.const_value is not None
        matrix = weight.const_value.numpy()
        size = block_of(len(matrix))
        pair = _blocks(graph, str(weight.name), np.ascontiguousarray(matrix.T), bits, size)
        replace(graph, node, [_by_blocks(x, pair, matrix.shape[0], matrix.shape[1], bits, size)])
    for node in [node for node in graph if node.op_type in ("Gemm", "Gather") and table_of(node) is not None]:
        weight = table_of(node)
        assert weight is not None
        assert weight.const_value is not None
        tokens, width = weight.shape.numpy()  # type: ignore[union-attr]
        size = block_of(width, TABLE_BLOCK_OF_4 if bits == 4 else BLOCK)
        if weight not in tables:
            tables[weight] = _blocks(graph, str(weight.name), weight.const_value.numpy(), bits, size)
        if node.op_type == "Gemm":
            replace(graph, node, [_by_blocks(node.inputs[0], tables[weight], width, tokens, bits, size)])
        else:
            replace(graph, node, _lookup(graph, node.inputs[1], tables[weight], width, bits, size))
    tidy(model)
    return Share(weights, weights - _weights(graph))


# ---- numbers


def per_column(matrix: Array) -> tuple[Array, Array]:
    """Return a matrix (K, N) as int8 from -127 to 127, and the scale of each column (N,)."""
    scales = np.abs(matrix).max(axis=0) / np.float32(127)
    scales = np.where(scales == 0, np.float32(1), scales).astype(np.float32)
    return np.clip(np.rint(matrix / scales), -127, 127).astype(np.int8), scales


def per_block(matrix: Array, bits: int, size: int) -> tuple[Array, Array]:
    """Return a matrix (N, K) in blocks of `size` inputs, and the scales of these (N, blocks).

    The blocks are uint8, (N, blocks, bytes of one). A number is (q - 2 ** (bits - 1)) * scale; of two that share a
    byte the first one has the lower half.
    """
    outputs, inputs = matrix.shape
    middle = 2 ** (bits - 1)
    padded = np.pad(matrix, ((0, 0), (0, -inputs % size))).astype(np.float32).reshape(outputs, -1, size)
    # The number that is farthest from 0 becomes -middle, which exists; its mirror image does not.
    places = np.abs(padded).argmax(axis=2)
    farthest = np.take_along_axis(padded, places[:, :, None], 2)[:, :, 0]
    scales = (farthest / np.float32(-middle)).astype(np.float32)
    scales[scales == 0] = 1
    numbers = np.clip(np.rint(padded / scales[:, :, None]) + middle, 0, 2 * middle - 1).astype(np.uint8)
    if bits == 4:
        numbers = numbers[:, :, ::2] | (numbers[:, :, 1::2] << 4)
    return numbers, scales


def block_of(inputs: int, most: int = BLOCK) -> int:
    """Return the largest size of blocks that fills them all, else the smallest one there is."""
    size = most
    while size > SMALLEST_BLOCK and inputs % size:
        size //= 2
    return size


# ---- nodes


def products(graph: ir.Graph) -> list[ir.Node]:
    """Return the nodes that multiply by a constant matrix."""
    return [node for node in graph if node.op_type == "MatMul" and _is_matrix(node.inputs[1])]


def _is_matrix(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.shape is not None and len(value.shape) == 2


def table_of(node: ir.Node) -> ir.Value | None:
    """Return the table (V, C) of an output layer or of a lookup of tokens."""
    value = node.inputs[1] if node.op_type == "Gemm" else node.inputs[0]
    if not _is_matrix(value):
        return None
    if node.op_type == "Gather" and not _finds_tokens(node.inputs[1]):
        return None
    return value


def _finds_tokens(value: ir.Value | None) -> bool:
    """Return whether what is looked up are the tokens, and not their positions."""
    while value is not None and value.name != "input_ids":
        made = value.producer()
        if made is None or made.op_type not in ("Reshape", "Cast", "Identity"):
            return False
        value = made.inputs[0]
    return value is not None


def _dynamic(x: ir.Value) -> tuple[ir.Node, tuple[ir.Value, ...]]:
    node = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
    return node, tuple(node.outputs)


def _calibrated(graph: ir.Graph, x: ir.Value, limits: tuple[float, float]) -> tuple[ir.Node, tuple[ir.Value, ...]]:
    least, greatest = min(limits[0], 0.0), max(limits[1], 0.0)
    step = (greatest - least) / 255 or 1.0
    scale = constant(graph, f"{x.name}_scale", np.array(step, np.float32))
    zero = constant(graph, f"{x.name}_zero", np.array(round(-least / step), np.uint8))
    node = ir.node("QuantizeLinear", [x, scale, zero])
    return node, (node.outputs[0], scale, zero)


def _blocks(graph: ir.Graph, name: str, matrix: Array, bits: int, size: int) -> tuple[ir.Value, ir.Value]:
    numbers, scales = per_block(matrix, bits, size)
    return constant(graph, f"{name}_q{bits}", numbers), constant(graph, f"{name}_scales", scales.ravel())


def _by_blocks(
    x: ir.Value | None, pair: Sequence[ir.Value], inputs: int, outputs: int, bits: int, size: int
) -> ir.Node:
    numbers = {"K": inputs, "N": outputs, "bits": bits, "block_size": size, "accuracy_level": ACCURACY}
    return ir.node("MatMulNBits", [x, *pair], numbers, domain=MICROSOFT)


def _lookup(
    graph: ir.Graph, tokens: ir.Value | None, pair: Sequence[ir.Value], width: int, bits: int, size: int
) -> list[ir.Node]:
    """Return the nodes that look rows of tokens (R, T) up in a table: -> (R, T, C)."""
    table, scales = pair
    name = str(table.name)
    nodes: list[ir.Node] = []

    def add(kind: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        nodes.append(ir.node(kind, list(inputs), attributes))
        return nodes[-1].outputs[0]

    def number(what: str, value: Any) -> ir.Value:
        return constant(graph, f"{name}_{what}", value)

    row = add("Gather", table, tokens, axis=0)  # (R, T, blocks, bytes)
    if bits == 4:
        low = add("BitwiseAnd", row, number("half", np.array(15, np.uint8)))
        high = add("BitShift", row, number("shift", np.array(4, np.uint8)), direction="RIGHT")
        last = number("last", np.array([-1]))
        pairs = add("Concat", add("Unsqueeze", low, last), add("Unsqueeze", high, last), axis=-1)
        row = add("Reshape", pairs, number("blocks", np.array([0, 0, 0, size])))
    whole = add("Sub", add("Cast", row, to=ir.DataType.FLOAT), number("middle", np.array(2 ** (bits - 1), np.float32)))
    by_row = add("Reshape", scales, number("by_row", np.array([-1, -(-width // size), 1])))
    scaled = add("Mul", whole, add("Gather", by_row, tokens, axis=0))
    flat = add("Reshape", scaled, number("flat", np.array([0, 0, -1])))
    if width % size:
        ends = (number(what, np.array([value])) for what, value in (("start", 0), ("end", width), ("axis", 2)))
        add("Slice", flat, *ends)
    return nodes


def constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """Return the initializer of this name, made at first."""
    if name not in graph.initializers:
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        graph.register_initializer(value)
    return graph.initializers[name]


def replace(graph: ir.Graph, node: ir.Node, made: list[ir.Node]) -> None:
    """Put nodes in the place of one; the last one's output is what that one's was."""
    old: Any = node.outputs[0]
    new: Any = made[-1].outputs[0]
    for one in made:
        one.name = f"{node.name}_{one.op_type}_{made.index(one)}"
        for place, output in enumerate(one.outputs):
            output.name = f"{one.name}_{place}"
    new.shape, new.dtype, new.name = old.shape, old.dtype, old.name
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, [old], [new])


def _weights(graph: ir.Graph) -> int:
    """Count the floating-point numbers in what products, output layers and lookups of tokens use."""
    kinds = ("MatMul", "Gemm", "Gather")
    used = {
        value
        for node in graph
        for value in node.inputs
        if node.op_type in kinds and value is not None and value.is_initializer() and value.dtype == ir.DataType.FLOAT
        if len(value.shape or ()) > 1 and (node.op_type != "Gather" or table_of(node) is value)
    }
    return sum(value.const_value.size for value in used if value.const_value is not None)


def tidy(model: ir.Model) -> None:
    """Leave out the weights that nothing uses any more."""
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
