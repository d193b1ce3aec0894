"""A captioner's halves as ONNX graphs, with the names and shapes that transformers.js and Optimum expect.

Their contract, by the files of transformers.js 4.3 and of optimum-onnx 0.1: inputs `pixel_values`, `input_ids`,
`encoder_hidden_states` and `past_key_values.N.key|value`; outputs `last_hidden_state`, `logits` and
`present.N.key|value`; the first axis of a past is called `batch_size`, its heads and their width are numbers. There is
no `use_cache_branch`: the decoder takes a past of length 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import opset20
from optimum.utils import DummyVisionInputGenerator, NormalizedConfigManager

from dbcap.errors import ModelError
from dbcap.exporting.halves import Decoder, Encoder, quiet_tracing, simplify
from dbcap.exporting.quantise import constant

OPSET = 20
op: Any = opset20
IMAGES, ROWS, TOKENS, BEFORE = "encoder_batch_size", "batch_size", "decoder_sequence_length", "past_sequence_length"


def make(model: Any, name: str) -> tuple[ir.Model, ir.Model]:
    """Return the encoder's and the decoder's graph of a `VisionEncoderDecoderModel`, which is of no use afterwards.

    The weights are not copied: they are the model's. Raises ModelError, which calls it `name`.
    """
    heads, layers, size = shape_of(model.config.decoder, name)
    simplify(model)
    whole = Encoder(model)
    vision = NormalizedConfigManager.get_normalized_config_class("vit")(model.config.encoder)
    pixels = DummyVisionInputGenerator("image-to-text", vision, batch_size=2).generate("pixel_values")
    _refuse_chance(whole, pixels, name)
    encoder = export(whole, (pixels,), ({0: _axis(IMAGES)},), ["pixel_values"], ["last_hidden_state"], name)
    handed = torch.zeros(2, 2 * layers, heads, _numbers(encoder))
    past = [torch.zeros(4, heads, 5, size) for _ in range(2 * layers)]
    row = _axis(ROWS)
    shapes = ({0: row, 1: _axis(TOKENS)}, {0: _axis(IMAGES)}, [{0: row, 2: _axis(BEFORE)}] * len(past))
    kinds = [f"{number}.{kind}" for number in range(layers) for kind in ("key", "value")]
    decoder = export(
        Decoder(model),
        (torch.zeros(4, 3, dtype=torch.int64), handed, past),
        shapes,
        ["input_ids", "encoder_hidden_states", *(f"past_key_values.{kind}" for kind in kinds)],
        ["logits", *(f"present.{kind}" for kind in kinds)],
        name,
    )
    return encoder, decoder


def _refuse_chance(encoder: Encoder, pixels: torch.Tensor, name: str) -> None:
    """Raise ModelError for an encoder that draws at random, as a masked autoencoder does: a graph would not."""
    with torch.no_grad():
        if not torch.equal(encoder(pixels), encoder(pixels)):
            raise ModelError(f"{name} has an encoder that makes something else of the same image each time")


def shape_of(config: Any, name: str) -> tuple[int, int, int]:
    """Return heads, layers and the width of a head of a decoder."""
    try:
        known = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
        heads, layers = int(known.num_attention_heads), int(known.num_layers)
        return heads, layers, int(known.hidden_size) // heads
    except (KeyError, AttributeError) as error:
        raise ModelError(f"{name} has a decoder of type {config.model_type}, which is not exported") from error


def _numbers(encoder: ir.Model) -> int:
    """Return S D, the last axis of what an encoder hands over."""
    shape: Any = encoder.graph.outputs[0].shape
    return int(shape[3])


def _axis(name: str) -> torch.export.Dim:
    return torch.export.Dim(name, min=1)


def export(
    module: torch.nn.Module, args: tuple[Any, ...], shapes: Any, inputs: list[str], outputs: list[str], name: str
) -> ir.Model:
    """Return the graph of a module as `torch.onnx.export` makes it of these arguments.

    `shapes` names the axes that may have any length. Raises ModelError, which calls the model `name`.
    """
    table: dict[Any, Any] = {
        torch.ops.dbcap.cross_attention.default: _cross_attention,
        torch.ops.dbcap.scores.default: _scores,
    }
    try:
        with quiet_tracing(), torch.inference_mode(False), torch.no_grad():
            program = torch.onnx.export(
                module,
                args,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                custom_translation_table=table,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # torch's exporter has errors of its own, one for each of its stages
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"{name} cannot be exported: {first}") from error
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # the lines of source that it comes from, with the paths they have here
    _settle_shapes(program.model.graph)
    RemoveUnusedNodesPass()(program.model)
    return program.model


def _settle_shapes(graph: ir.Graph) -> None:
    """Give Reshapes constant shapes, where at most one axis of a length that varies is new.

    In a decoder of one token, computing shapes takes about as long as its attention.
    """
    for node in graph:
        data, shape = node.inputs[:2] if node.op_type == "Reshape" else (None, None)
        if data is None or shape is None or shape.const_value is not None:
            continue
        before, after = data.shape, node.outputs[0].shape
        if before is None or after is None:
            continue
        told = [_told(dim, before[place] if place < len(before) else None) for place, dim in enumerate(after)]
        if told.count(-1) <= 1:
            name = "_".join(["shape", *map(str, told)])
            node.replace_input_with(1, constant(graph, name, np.array(told)))
            node.attributes.pop("allowzero", None)


def _told(dim: int | ir.SymbolicDim, before: int | ir.SymbolicDim | None) -> int:
    """Return how a Reshape is told of an axis: by its length, by 0 if it stays as it was, else by -1."""
    if isinstance(dim, int):
        return dim
    return 0 if dim.value is not None and dim == before else -1


# ---- translations; onnxscript reads them as source


def _cross_attention(query: Any, keys: Any, values: Any, scale: float) -> Any:
    """See `halves.cross_attention`."""
    by_row = op.Transpose(query, perm=[0, 2, 1, 3])
    heads = op.Shape(query, start=1, end=2)
    size = op.Shape(query, start=3, end=4)
    images = op.Shape(values, start=0, end=1)
    by_image = op.Reshape(by_row, op.Concat(images, op.Constant(value_ints=[-1]), heads, size, axis=0))
    scores = op.Mul(op.MatMul(keys, op.Transpose(by_image, perm=[0, 2, 3, 1])), op.Constant(value_float=scale))
    chances = op.Softmax(op.Transpose(scores, perm=[0, 1, 3, 2]), axis=-1)
    attended = op.Transpose(op.MatMul(chances, values), perm=[0, 2, 1, 3])
    return op.Reshape(attended, op.Shape(by_row))


def _scores(hidden: Any, table: Any) -> Any:
    """See `halves.scores`: a Gemm, which takes the table as the embedding has it."""
    width = op.Shape(hidden, start=2, end=3)
    flat = op.Reshape(hidden, op.Concat(op.Constant(value_ints=[-1]), width, axis=0))
    logits = op.Gemm(flat, table, transB=1)
    vocabulary = op.Shape(table, start=0, end=1)
    return op.Reshape(logits, op.Concat(op.Shape(hidden, start=0, end=2), vocabulary, axis=0))
