"""The ONNX engine on exported files: how many rows it computes, what it hands back, and its graph."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from dbcap.captioning.engines.onnx import OnnxEngine
from dbcap.captioning.search import MIN_ROWS
from dbcap.errors import ModelError
from dbcap.models.exported import files_of
from dbcap.models.onnx_session import run_errors

WORDS = 10_000
"""More than the vocabulary has."""


@pytest.fixture(scope="module")
def engine(gpt2):
    """A function that loads a variant."""

    def load(variant: str, threads: int = 1) -> OnnxEngine:
        encoder, decoder = (gpt2 / "onnx" / name for name in files_of(variant))
        return OnnxEngine(encoder, decoder, threads)

    return load


@pytest.fixture(scope="module")
def pixels(gpt2):
    """Of five images."""
    shape = onnx.load(gpt2 / "onnx" / "encoder_model.onnx").graph.input[0].type.tensor_type.shape
    sides = [axis.dim_value or 32 for axis in shape.dim[1:]]
    return np.random.default_rng(0).standard_normal((5, *sides)).astype(np.float32)


def step(engine, cache, rows, best=3):
    return engine.step(np.arange(rows) + 1, cache, best, np.zeros((rows, 1), np.int64))


@pytest.mark.parametrize("variant", ["fp32", "fp16", "int8", "q4"])
@pytest.mark.parametrize(("images", "width"), [(1, 1), (3, 1), (4, 1), (1, 3), (3, 3), (1, 4)])
def test_rows_are_filled_up_as_kernels_need_it(engine, pixels, variant, images, width):
    loaded = engine(variant)
    cache = loaded.encode(pixels[:images], width, 8)
    rows = images * width
    found = [step(loaded, cache, rows) for _ in range(2)][-1]
    computed = cache.past[0].shape()[0]
    assert [len(one) for one in found] == [rows] * 5
    assert computed % width == 0
    if variant in ("int8", "q4"):
        assert computed == rows + (width if rows % 2 else 0)
    else:
        assert computed >= MIN_ROWS
        assert computed - rows < max(MIN_ROWS, width)


def test_rows_that_leave_leave_the_others_as_they_were(engine, pixels):
    loaded = engine("int8")
    whole, fewer = (loaded.encode(pixels, 2, 8) for _ in range(2))
    for cache in (whole, fewer):
        step(loaded, cache, 10)
    loaded.reorder(fewer, np.array([3, 2, 9, 9]))
    loaded.reorder(whole, np.array([1, 0, 3, 2, 4, 5, 6, 7, 9, 9]))
    tokens, watched = np.arange(10), np.zeros((10, 0), np.int64)
    stay = [2, 3, 8, 9]
    left, kept = loaded.step(tokens[stay], fewer, 5, watched[stay]), loaded.step(tokens, whole, 5, watched)
    assert np.array_equal(left.tokens, kept.tokens[stay])
    assert np.array_equal(left.logprobs, kept.logprobs[stay])


def test_log_probabilities_are_those_of_the_whole_vocabulary(engine, pixels):
    loaded = engine("fp32")
    found = step(loaded, loaded.encode(pixels[:4], 1, 8), 4, WORDS)
    assert found.tokens.shape[1] < WORDS
    assert np.allclose(np.exp(found.logprobs).sum(1), 1, atol=1e-5)
    assert np.allclose(np.ptp(found.logits - found.logprobs, axis=1), 0, atol=1e-4)
    place = found.tokens == 0
    assert np.array_equal(found.logprobs[place], found.watched_logprobs[:, 0])
    assert np.array_equal(found.logits[place], found.watched_logits[:, 0])


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_images_side_by_side_are_encoded_as_one_by_one(engine, pixels, variant):
    one, two = (engine(variant, threads).encode(pixels, 1, 8).cross for threads in (1, 2))
    assert all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[0].numpy()[0], one[0].numpy()[1])


@pytest.mark.parametrize("name", ["encoder_model.onnx", "decoder_model_merged.onnx"])
def test_shapes_are_computed_only_where_a_cross_attention_needs_them(gpt2, name):
    graph = onnx.load(gpt2 / "onnx" / name).graph
    constant = {one.name for one in graph.initializer}
    made = {node.output[0]: node.op_type for node in graph.node}
    kinds = Counter(made[n.input[1]] for n in graph.node if n.op_type == "Reshape" and n.input[1] not in constant)
    assert kinds["Concat"] <= 2 + 1  # a layer each, and one of the output layer
    used = {value for node in graph.node for value in node.input} | {value.name for value in graph.output}
    assert all(set(node.output) & used for node in graph.node)


def test_files_of_something_else_are_refused_as_they_are_loaded(gpt2, tmp_path):
    encoder, decoder = (gpt2 / "onnx" / name for name in files_of("fp32"))
    model, deeper = onnx.load(encoder), tmp_path / "encoder_model.onnx"
    model.graph.node[-1].output[:] = ["layers"]
    model.graph.node.append(onnx.helper.make_node("Concat", ["layers"] * 2, ["last_hidden_state"], axis=1))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value *= 2
    onnx.save(model, deeper)
    for one, other, said in (
        (decoder, decoder, "decoder_model_merged.onnx is not what dbcap or Optimum export: it asks for input_ids"),
        (encoder, encoder, "it is no decoder of dbcap's"),
        (deeper, decoder, "are not of one model"),
    ):
        with pytest.raises(ModelError, match=said):
            OnnxEngine(one, other, 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_what_goes_wrong_as_a_file_runs_is_one_line_and_no_log(engine, pixels, capfd, threads):
    loaded = engine("fp32", threads)
    with pytest.raises(ModelError, match=r"encoder_model\.onnx cannot be run: .*invalid dimensions"):
        loaded.encode(pixels[:, :, :9], 1, 8)
    cache = loaded.encode(pixels, 1, 8)
    with pytest.raises(ModelError, match=r"decoder_model_merged\.onnx cannot be run: .*out of data bounds"):
        loaded.step(np.full(5, 999_999), cache, 1, np.zeros((5, 0), np.int64))
    assert capfd.readouterr().err == ""


def test_a_lack_of_memory_stays_what_it_is():
    with pytest.raises(RuntimeError, match="alloc"), run_errors(Path("x.onnx")):
        raise RuntimeError("Failed to allocate memory for requested buffer of size 9")
