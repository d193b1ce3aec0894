"""The ONNX engine: an exported captioner on ONNX Runtime, on the CPU. Nothing here imports torch.

The encoder gets each image by itself: with int8 weights the rows of what it gets share a scale, and no caption is to
depend on the images beside it. Where there are as many images as threads, each thread takes one of its own: that is
faster than all of them on one image after the other. The decoder's file is the one that other runtimes
read; for the search its ends are changed as it is loaded. At its beginning, the keys and values that the encoder handed
over as one tensor come in layer by layer, since taking a tensor apart is a copy, at every step; and the rows of the
past are put in the search's order where they are read anyway. At its end, of all logits only what the search looks at
is handed back.

Kernels round differently when few rows are multiplied, or an odd number of them: such batches are filled up here with
the last image again. B images, R rows, T tokens, L layers, V the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import OrtValue

from dbcap.captioning.rules import Best, Ids
from dbcap.captioning.search import MIN_ROWS
from dbcap.errors import ModelError
from dbcap.models.exported import MODEL
from dbcap.models.onnx_session import check, opened, run_errors

HANDED = "encoder_hidden_states"
FOUND = ("tokens", "top_logits", "top_logprobs", "watched_logits", "watched_logprobs")
"""The outputs that the search looks at: see `rules.Best`."""
STEP = ("input_ids", "rows", "best", "watched")
"""The inputs of a step beside keys and values."""


@dataclass
class Cache:
    """What a step reads."""

    cross: list[OrtValue]
    """2 L of (B, H, S D): keys and values of the images, and of those that fill up."""
    past: list[OrtValue]
    """2 L of (R, H, T, D): those of the tokens so far, as the last step left them."""
    rows: Ids
    """Which of their rows stand where, since; without those that fill up."""
    width: int
    """Rows of an image."""

    def filled(self) -> Ids:
        """Return the row that stands at each place of a step: the last image's again where more are wanted."""
        missing = self.cross[0].shape()[0] - len(self.rows) // self.width
        rows = np.arange(len(self.rows))
        return np.concatenate([rows, *[rows[-self.width :]] * missing])


class OnnxEngine:
    """Runs the two graphs of an exported captioner."""

    leaves = True
    """A row depends on no other one: neither do float32 products, nor those that quantise each row by itself."""

    def __init__(self, encoder: Path, decoder: Path, threads: int) -> None:
        """Load the two files. Raises ModelError where they are not what dbcap exports, or damaged."""
        self._decoder = opened(decoder, threads, _for_search)
        self._encoder = opened(encoder, threads)
        self._files, self._threads = (encoder, decoder), threads
        past = [one for one in self._decoder.get_inputs() if one.name.startswith("past_key_values.")]
        self._past = [one.name for one in past]
        self._heads, self._size = past[0].shape[1], past[0].shape[3]
        self._outputs = [*FOUND, *(name.replace("past_key_values", "present") for name in self._past)]
        told = self._decoder.get_modelmeta().custom_metadata_map
        self.vocabulary = int(told["vocabulary"])
        """How many tokens there are."""
        self._by_blocks = bool(told["by_blocks"])
        check(self._encoder, encoder, ["pixel_values"], ["last_hidden_state"])
        cross = [f"cross.{number}" for number in range(len(past))]
        check(self._decoder, decoder, [*STEP, *cross, *self._past], self._outputs)
        has_layers = self._encoder.get_outputs()[0].shape[1:2] == [len(cross)]  # keys and values of each
        if not has_layers or self._encoder.get_modelmeta().custom_metadata_map.get(MODEL) != told.get(MODEL):
            raise ModelError(f"{encoder} and {decoder} are not of one model", "export the model again")

    def encode(self, pixels: npt.NDArray[np.float32], width: int, length: int) -> Cache:  # noqa: ARG002
        """Encode pixels (B, 3, H, W), and make the cache for B x `width` rows."""
        images = len(pixels)
        enough = self._enough(images, width)
        cross: list[npt.NDArray[np.float32]] = []
        for place, handed in enumerate(self._hand_over(pixels)):
            cross = cross or [np.empty((enough, *part.shape), np.float32) for part in handed]
            for whole, part in zip(cross, handed, strict=True):
                whole[place if place < images - 1 else slice(place, None)] = part
        empty = np.empty((enough * width, self._heads, 0, self._size), np.float32)
        past = [OrtValue.ortvalue_from_numpy(empty) for _ in self._past]
        return Cache([OrtValue.ortvalue_from_numpy(one) for one in cross], past, np.arange(images * width), width)

    def _hand_over(self, pixels: npt.NDArray[np.float32]) -> Iterator[npt.NDArray[np.float32]]:
        """Yield what the encoder hands over of each image: (2 L, H, S D)."""
        if 1 < self._threads <= len(pixels):
            encoder, workers = self._side_by_side
            yield from workers.map(functools.partial(self._encoded, encoder), pixels)
        else:
            yield from (self._encoded(self._encoder, image) for image in pixels)

    def _encoded(self, encoder: Any, image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        with run_errors(self._files[0]):
            (handed,) = encoder.run(["last_hidden_state"], {"pixel_values": image[None]})
        found: npt.NDArray[np.float32] = handed[0]
        return found

    @functools.cached_property
    def _side_by_side(self) -> tuple[Any, ThreadPoolExecutor]:
        """The encoder on one thread, and the threads that it is called from."""
        return opened(self._files[0], 1), ThreadPoolExecutor(self._threads)

    def _enough(self, images: int, width: int) -> int:
        """Return how many images there must be for no row to depend on how many there are."""
        if self._by_blocks:  # these kernels take rows by twos, and one that is left over another way
            return images + images * width % 2
        return max(images, -(-MIN_ROWS // width))

    def step(self, tokens: Ids, cache: Cache, best: int, watched: Ids) -> Best:
        """Decode one token of each row (R,); see `search.Engine`."""
        binding = self._decoder.io_binding()
        filled = cache.filled()
        small = {
            "input_ids": tokens[filled, None],
            "rows": cache.rows[filled],
            "best": np.array([min(best, self.vocabulary)]),
            "watched": np.maximum(watched[filled], 0),
        }
        for name, array in small.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for number, value in enumerate(cache.cross):
            binding.bind_ortvalue_input(f"cross.{number}", value)
        for name, value in zip(self._past, cache.past, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name)
        with run_errors(self._files[1]):
            self._decoder.run_with_iobinding(binding)
        found = binding.get_outputs()
        cache.past, cache.rows = list(found[len(FOUND) :]), np.arange(len(tokens))
        return Best(*(value.numpy()[: len(tokens)] for value in found[: len(FOUND)]))

    def reorder(self, cache: Cache, rows: Ids) -> None:
        """Put old row `rows[i]` at row i; where there are fewer rows, whole images left."""
        if len(rows) < len(cache.rows):
            staying = rows[:: cache.width] // cache.width
            missing = self._enough(len(staying), cache.width) - len(staying)
            staying = np.concatenate([staying, np.repeat(staying[-1:], missing)])
            cache.cross = [OrtValue.ortvalue_from_numpy(value.numpy()[staying]) for value in cache.cross]
        cache.rows = cache.rows[rows]


# ---- the decoder's graph, for the search


def _for_search(model: onnx.ModelProto) -> None:
    """Change the ends of a decoder's graph, in place: see the top of this file."""
    graph = model.graph
    inputs = {value.name: value for value in graph.input}
    past = inputs.get("past_key_values.0.key")
    if HANDED not in inputs or "use_cache_branch" in inputs or past is None:
        raise ModelError("it is no decoder of dbcap's")
    axes = [past.type.tensor_type.shape.dim[place] for place in (1, 3)]
    axes.append(graph.output[0].type.tensor_type.shape.dim[2])
    if not all(axis.dim_value for axis in axes):
        raise ModelError("its heads, their width or its vocabulary have no fixed size")
    nodes = _order_rows(graph) + _by_layer(graph)
    vocabulary = axes[-1].dim_value
    by_blocks = any(node.op_type == "MatMulNBits" for node in nodes)
    for key, value in (("vocabulary", str(vocabulary)), ("by_blocks", "yes" * by_blocks)):
        model.metadata_props.add(key=key, value=value)
    nodes += _look(graph, vocabulary)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.input.remove(inputs[HANDED])


def _by_layer(graph: Any) -> list[Any]:
    """Make each layer's part of what the encoder hands over an input; returns all nodes, the Gathers replaced."""
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast" and node.input[0] == HANDED}
    nodes = []
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in (HANDED, *casts):
            name = f"cross.{int(_value_of(graph, node.input[1]))}"
            graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["images", "heads", "numbers"]))
            # In float16 the graph converts what comes in.
            cast = casts.get(node.input[0])
            kind, how = ("Cast", {"to": cast.attribute[0].i}) if cast else ("Identity", {})
            nodes.append(helper.make_node(kind, [name], list(node.output), name=name, **how))
        elif node.output[0] not in casts:
            nodes.append(node)
    if any(HANDED in node.input for node in nodes):
        raise ModelError(f"what it does with {HANDED} is not known")
    return nodes


def _value_of(graph: Any, name: str) -> Any:
    for initializer in graph.initializer:
        if initializer.name == name:
            return numpy_helper.to_array(initializer)
    raise ModelError(f"{name} is no constant")


def _order_rows(graph: Any) -> list[Any]:
    """Add the input `rows`, and read each past in their order."""
    graph.input.append(helper.make_tensor_value_info("rows", TensorProto.INT64, ["batch_size"]))
    past = [value.name for value in graph.input if value.name.startswith("past_key_values.")]
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in past:
                node.input[place] = f"{name}.ordered"
    return [
        helper.make_node("Gather", [name, "rows"], [f"{name}.ordered"], name=f"{name}.order", axis=0) for name in past
    ]


def _look(graph: Any, vocabulary: int) -> list[Any]:
    """Take the `best` tokens and the `watched` ones out of the logits of the one token of each row."""
    for name, shape in (("best", [1]), ("watched", ["batch_size", "watched"])):
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, shape))
    graph.initializer.append(numpy_helper.from_array(np.array([-1, vocabulary]), "search.shape"))
    nodes = [
        helper.make_node("Reshape", ["logits", "search.shape"], ["search.logits"]),
        helper.make_node("LogSoftmax", ["search.logits"], ["search.logprobs"], axis=1),
        helper.make_node("TopK", ["search.logits", "best"], ["top_logits", "tokens"], axis=1),
        helper.make_node("GatherElements", ["search.logprobs", "tokens"], ["top_logprobs"], axis=1),
        helper.make_node("GatherElements", ["search.logits", "watched"], ["watched_logits"], axis=1),
        helper.make_node("GatherElements", ["search.logprobs", "watched"], ["watched_logprobs"], axis=1),
    ]
    for node in nodes:
        node.name = f"search.{node.op_type}.{node.output[0]}"
    kept = [value for value in graph.output if value.name != "logits"]
    del graph.output[:]
    for name in FOUND:
        kind = TensorProto.INT64 if name == "tokens" else TensorProto.FLOAT
        graph.output.append(helper.make_tensor_value_info(name, kind, ["batch_size", name]))
    graph.output.extend(kept)
    return nodes
