"""The ranges of the numbers that an encoder multiplies, measured on images: for quantising that is fixed beforehand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from dbcap.exporting.quantise import Ranges, products


def measure(encoder: ir.Model, pixels: Iterable[npt.NDArray[np.float32]], scratch: Path) -> Ranges:
    """Return the range of what each product multiplies, over images (3, H, W); `scratch` is a file to write to."""
    model = encoder.clone()
    names = list(dict.fromkeys(str(node.inputs[0].name) for node in products(model.graph) if node.inputs[0]))
    values = {str(node.inputs[0].name): node.inputs[0] for node in products(model.graph) if node.inputs[0]}
    model.graph.outputs.clear()
    for name in names:
        for kind in ("ReduceMin", "ReduceMax"):
            node = ir.node(kind, [values[name]], {"keepdims": 0})
            node.outputs[0].name = f"{name}.{kind}"
            node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([])
            model.graph.append(node)
            model.graph.outputs.append(node.outputs[0])
    ir.save(model, scratch)
    try:
        session: Any = onnxruntime.InferenceSession(str(scratch), providers=["CPUExecutionProvider"])
    finally:
        scratch.unlink()
    rows = np.array([session.run(None, {"pixel_values": image[None]}) for image in pixels])
    least, greatest = rows[:, ::2].min(axis=0), rows[:, 1::2].max(axis=0)
    return {name: (float(low), float(high)) for name, low, high in zip(names, least, greatest, strict=True)}
