"""How many weights ONNX files hold, by their headers: nothing else is read of files of gigabytes.

The wire format: https://protobuf.dev/programming-guides/encoding; the field numbers are those of onnx.proto3.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

from dbcap.errors import ModelError

_GRAPH, _INITIALIZER, _DIMS = 7, 5, 1
"""Of ModelProto, GraphProto and TensorProto."""
_WIDTHS = {1: 8, 5: 4}
"""Bytes of the kinds of field that have always as many."""
_NUMBER, _BYTES = 0, 2

_Span = tuple[int, int]


def count(files: Iterable[Path]) -> int:
    """Return the number of weights in the graphs of files. Raises ModelError for a damaged one."""
    return sum(_count(path) for path in files)


def _count(path: Path) -> int:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            graphs = _inside(data, (0, len(data)), _GRAPH)
            tensors = [tensor for graph in graphs for tensor in _inside(data, graph, _INITIALIZER)]
            return sum(math.prod(_dims(data, tensor)) for tensor in tensors)
    except (OSError, ValueError, IndexError) as error:
        raise ModelError(f"{path} is damaged: {error}", "fetch or export it again") from error


def _dims(data: mmap.mmap, span: _Span) -> Iterator[int]:
    for field, kind, (start, end) in _fields(data, span):
        if field == _DIMS and kind == _NUMBER:
            yield _varint(data, start)[0]
        elif field == _DIMS and kind == _BYTES:
            while start < end:
                number, start = _varint(data, start)
                yield number


def _inside(data: mmap.mmap, span: _Span, wanted: int) -> Iterator[_Span]:
    return (place for field, kind, place in _fields(data, span) if field == wanted and kind == _BYTES)


def _fields(data: mmap.mmap, span: _Span) -> Iterator[tuple[int, int, _Span]]:
    """Yield number, kind and place of each field of a message."""
    place, end = span
    while place < end:
        key, start = _varint(data, place)
        field, kind = key >> 3, key & 7
        if kind == _NUMBER:
            _, place = _varint(data, start)
        elif kind == _BYTES:
            size, start = _varint(data, start)
            place = start + size
        elif kind in _WIDTHS:
            place = start + _WIDTHS[kind]
        else:
            raise ValueError("it is no ONNX file")
        if place > end:
            raise ValueError("it ends too early")
        yield field, kind, (start, place)


def _varint(data: mmap.mmap, place: int) -> tuple[int, int]:
    """Return a number of any length and where it ends."""
    number = shift = 0
    while True:
        byte = data[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number, place
