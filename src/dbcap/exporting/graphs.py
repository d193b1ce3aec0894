"""A captioner's halves as ONNX graphs, with the names and shapes that transformers.js and Optimum expect.

Their contract, by the files of transformers.js 4.3 and of optimum-onnx 0.1: inputs `pixel_values`, `input_ids`,
`encoder_hidden_states` and `past_key_values.N.key|value`; outputs `last_hidden_state`, `logits` and
`present.N.key|value`; the first axis of a past is called `batch_size`, its heads and their width are numbers. There is
no `use_cache_branch`: the decoder takes a past of length 0.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset20
from optimum.utils import DummyVisionInputGenerator, NormalizedConfigManager

from dbcap.errors import ModelError
from dbcap.exporting.halves import Decoder, Encoder, quiet_tracing, simplify

OPSET = 20
op: Any = opset20
IMAGES, ROWS, TOKENS, BEFORE = "encoder_batch_size", "batch_size", "decoder_sequence_length", "past_sequence_length"


def make(model: Any, name: str) -> tuple[ir.Model, ir.Model]:
    """Return the encoder's and the decoder's graph of a `VisionEncoderDecoderModel`, which is of no use afterwards.

    The weights are not copied: they are the model's. Raises ModelError, which calls it `name`.
    """
    heads, layers, size = shape_of(model.config.decoder, name)
    simplify(model)
    vision = NormalizedConfigManager.get_normalized_config_class("vit")(model.config.encoder)
    pixels = DummyVisionInputGenerator("image-to-text", vision, batch_size=2).generate("pixel_values")
    encoder = export(Encoder(model), (pixels,), ({0: _axis(IMAGES)},), ["pixel_values"], ["last_hidden_state"], name)
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

    `shapes` has what names the axes that may have any length. Raises ModelError, which calls the model `name`.
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
    return program.model


# ---- translations; onnxscript reads them as source


def _cross_attention(query: Any, keys: Any, values: Any, scale: float) -> Any:
    """See `halves.cross_attention`."""
    rows = op.Shape(query, start=0, end=1)
    heads = op.Shape(query, start=1, end=2)
    tokens = op.Shape(query, start=2, end=3)
    size = op.Shape(query, start=3, end=4)
    images = op.Shape(values, start=0, end=1)
    any_number = op.Constant(value_ints=[-1])
    by_image = op.Reshape(query, op.Concat(images, any_number, heads, tokens, size, axis=0))
    queries = op.Reshape(
        op.Transpose(by_image, perm=[0, 2, 1, 3, 4]), op.Concat(images, heads, any_number, size, axis=0)
    )
    chances = op.Softmax(op.Mul(op.MatMul(queries, keys), op.Constant(value_float=scale)), axis=-1)
    attended = op.Reshape(op.MatMul(chances, values), op.Concat(images, heads, any_number, tokens, size, axis=0))
    return op.Reshape(op.Transpose(attended, perm=[0, 2, 3, 1, 4]), op.Concat(rows, tokens, heads, size, axis=0))


def _scores(hidden: Any, table: Any) -> Any:
    """See `halves.scores`: a Gemm, which takes the table as the embedding has it."""
    width = op.Shape(hidden, start=2, end=3)
    flat = op.Reshape(hidden, op.Concat(op.Constant(value_ints=[-1]), width, axis=0))
    logits = op.Gemm(flat, table, transB=1)
    vocabulary = op.Shape(table, start=0, end=1)
    return op.Reshape(logits, op.Concat(op.Shape(hidden, start=0, end=2), vocabulary, axis=0))
