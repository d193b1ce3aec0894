"""Writing an ONNX graph weight by weight: protobuf's own writer would hold all of them twice more in memory.

The wire format: https://protobuf.dev/programming-guides/encoding; the field numbers are those of onnx.proto3.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from dbcap.models.exported import EXTERNAL

LARGEST = 1_900_000_000
"""Bytes of weights that a file holds; protobuf ends at 2 GiB."""
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
"""Of ModelProto, GraphProto and TensorProto."""


def save(model: ir.Model, path: Path, release: Callable[[], None] = lambda: None) -> None:
    """Write a model; the weights of a larger one than protobuf takes go into a file beside it, its name and `_data`.

    `release` is called after each weight that was read.
    """
    weights: list[Any] = [value.const_value for value in model.graph.initializers.values()]
    if sum(weight.nbytes for weight in weights) > LARGEST:
        ir.save(model, path, external_data=f"{path.name}{EXTERNAL}", callback=lambda *_: release())
        return
    heads = [_head(name, weight) for name, weight in zip(model.graph.initializers, weights, strict=True)]
    frame = model.clone()
    frame.graph.initializers.clear()
    proto = ir.to_proto(frame)
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    sizes = [
        len(head) + len(_begin(_RAW_DATA, weight.nbytes)) + weight.nbytes
        for head, weight in zip(heads, weights, strict=True)
    ]
    whole = len(graph) + sum(len(_begin(_INITIALIZER, size)) + size for size in sizes)
    with path.open("wb") as file:
        file.write(proto.SerializeToString())
        file.write(_begin(_GRAPH, whole))
        file.write(graph)
        for head, weight, size in zip(heads, weights, sizes, strict=True):
            file.write(_begin(_INITIALIZER, size) + head + _begin(_RAW_DATA, weight.nbytes))
            file.write(weight.tobytes())
            release()


def _head(name: str, weight: Any) -> bytes:
    """Return a weight's message without its numbers."""
    proto = onnx.TensorProto(name=name, data_type=int(weight.dtype), dims=weight.shape.numpy())
    return proto.SerializeToString()


def _begin(field: int, size: int) -> bytes:
    """Return what stands before a field of so many bytes: its number and kind, and its length as a varint."""
    made = bytearray([field << 3 | 2])
    while size >= 128:
        made.append(size & 127 | 128)
        size >>= 7
    made.append(size)
    return bytes(made)
