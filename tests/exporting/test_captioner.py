"""Exported captioners say what they said on torch, hold their weights once, and keep to the contract of runtimes."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import transformers
from safetensors import safe_open

from dbcap import Captioner, pipeline
from dbcap.captioning.decoding import Decoding
from dbcap.config.models import CaptionConfig
from dbcap.errors import ModelError, UsageError
from dbcap.testing.models import write_tiny

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "candidates": {"num_beams": 3, "num_captions": 3, "length_penalty": 0.5},
    "never too early": {"num_beams": 2, "early_stopping": "never"},
    "lengths": {"min_length": 5, "max_length": 9, "num_beams": 2},
    "no repetition": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    "drawn": {"sample": True, "num_captions": 2, "top_k": 20, "top_p": 0.9, "temperature": 0.8},
    "drawn from all": {"sample": True, "top_k": 0},
}


@pytest.fixture(scope="module")
def captioners(tiny_captioner, swin_model, gpt2, bert):
    """Each model on torch and exported."""
    pairs = {"gpt2": (tiny_captioner, gpt2), "bert": (swin_model, bert)}
    return {
        name: (Captioner.load(model, dtype="float32"), Captioner.load(f"{folder}:fp32"))
        for name, (model, folder) in pairs.items()
    }


@pytest.fixture(scope="module")
def pictures() -> Any:
    """Eight images (8, H, W, 3)."""
    return np.random.default_rng(0).integers(0, 256, (8, 40, 52, 3), np.uint8)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("decoder", ["gpt2", "bert"])
def test_float32_says_what_torch_says(captioners, pictures, decoder, options):
    plain, exported = captioners[decoder]
    expected, found = plain.caption(pictures, **options), exported.caption(pictures, **options)
    assert [one.text for one in found] == [one.text for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert [c.text for c in one.candidates] == [c.text for c in other.candidates]
        assert np.allclose([c.score for c in one.candidates], [c.score for c in other.candidates], atol=1e-4)
    assert len({one.text for one in found}) > 1


@pytest.mark.parametrize("variant", ["fp32", "fp16", "int8", "q4"])
def test_a_caption_depends_on_no_other_image(gpt2, pictures, variant):
    exported = Captioner.load(f"{gpt2}:{variant}")
    for options in ({}, {"num_beams": 3}):
        alone = [exported.caption(picture, **options) for picture in pictures]
        for size in (3, 8):
            together = exported.caption(pictures, batch_size=size, **options)
            assert [one.text for one in together] == [one.text for one in alone]


def test_float16_is_near_and_int8_is_taken_when_nothing_is_said(gpt2, pictures):
    plain, half = Captioner.load(f"{gpt2}:fp32"), Captioner.load(f"{gpt2}:fp16")
    pairs = zip(half.caption(pictures), plain.caption(pictures), strict=True)
    assert sum(one.text == other.text for one, other in pairs) >= 6  # random weights leave near ties
    by_itself, named = Captioner.load(gpt2), Captioner.load(f"{gpt2}:int8")
    assert by_itself.caption(pictures) == named.caption(pictures)


# ---- the files


def model_of(folder: Path, name: str) -> onnx.ModelProto:
    return onnx.load(folder / "onnx" / name)


def axes(value: Any) -> list[Any]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


def test_names_and_axes_are_those_that_runtimes_expect(gpt2):
    graph = model_of(gpt2, "decoder_model_merged.onnx").graph
    inputs = {value.name: axes(value) for value in graph.input}
    kinds = [f"{number}.{kind}" for number in range(2) for kind in ("key", "value")]
    assert list(inputs) == ["input_ids", "encoder_hidden_states", *(f"past_key_values.{kind}" for kind in kinds)]
    assert [value.name for value in graph.output] == ["logits", *(f"present.{kind}" for kind in kinds)]
    assert inputs["past_key_values.0.key"] == ["batch_size", 2, "past_sequence_length", 16]
    assert not {"If", "Loop"} & {node.op_type for node in graph.node}
    encoder = model_of(gpt2, "encoder_model.onnx").graph
    assert [value.name for value in (*encoder.input, *encoder.output)] == ["pixel_values", "last_hidden_state"]
    assert isinstance(axes(encoder.output[0])[0], str)


@pytest.mark.parametrize("suffix", ["", "_fp16", "_int8", "_q4"])
def test_the_vocabulary_stands_in_one_table(gpt2, suffix):
    words = json.loads((gpt2 / "config.json").read_text())["decoder"]["vocab_size"]
    tables = [
        weight
        for weight in model_of(gpt2, f"decoder_model_merged{suffix}.onnx").graph.initializer
        if words in weight.dims and math.prod(weight.dims) > 4 * words
    ]
    assert len(tables) == 1
    assert tables[0].dims[0] == words


def test_weights_are_stored_once(tiny_captioner, gpt2):
    with safe_open(tiny_captioner / "model.safetensors", "numpy") as file:
        numbers = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    stored = sum(
        math.prod(weight.dims)
        for name in ("encoder_model.onnx", "decoder_model_merged.onnx")
        for weight in model_of(gpt2, name).graph.initializer
        if weight.data_type == onnx.TensorProto.FLOAT
    )
    assert stored <= 1.02 * numbers


def test_quantised_layers_are_of_the_kind_that_is_fast(gpt2):
    encoder = Counter(node.op_type for node in model_of(gpt2, "encoder_model_int8.onnx").graph.node)
    assert (encoder["MatMulInteger"], encoder["DynamicQuantizeLinear"]) == (14, 9)
    for suffix, bits in (("_int8", 8), ("_q4", 4)):
        nodes = [
            n for n in model_of(gpt2, f"decoder_model_merged{suffix}.onnx").graph.node if n.op_type == "MatMulNBits"
        ]
        told = [{one.name: one.i for one in node.attribute} for node in nodes]
        assert {(one["bits"], one["accuracy_level"]) for one in told} == {(bits, 4)}
        assert len(told) == 2 * 6 + 1


def test_quantized_is_int8_by_its_other_name_and_q4_has_its_encoder(gpt2):
    int8 = (gpt2 / "onnx" / "encoder_model_int8.onnx").stat()
    assert (gpt2 / "onnx" / "encoder_model_quantized.onnx").stat().st_ino == int8.st_ino
    assert (gpt2 / "onnx" / "encoder_model_q4.onnx").stat().st_ino == int8.st_ino


def test_the_folder_tells_all_that_runtimes_would_take_from_defaults(gpt2):
    config = json.loads((gpt2 / "config.json").read_text())
    assert config["model_type"] == "vision-encoder-decoder"
    assert {"n_head", "n_layer", "n_embd"} <= set(config["decoder"])
    processor = json.loads((gpt2 / "preprocessor_config.json").read_text())
    assert {"image_processor_type", "size", "image_mean", "rescale_factor", "resample"} <= set(processor)
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {p.name for p in gpt2.iterdir()}


def test_the_layout_of_optimum_has_one_variant_under_standard_names(tiny_captioner, export, gpt2, tmp_path, pictures):
    out = export(tiny_captioner, tmp_path / "o", int8=True, fp32=False, layout="optimum")
    assert sorted(path.name for path in out.glob("**/*.onnx")) == ["decoder_model_merged.onnx", "encoder_model.onnx"]
    assert not (out / "onnx").exists()
    assert Captioner.load(out).caption(pictures) == Captioner.load(f"{gpt2}:int8").caption(pictures)
    assert Captioner.load(f"{out}:int8").caption(pictures) == Captioner.load(out).caption(pictures)
    with pytest.raises(UsageError, match=r"has no variant fp32; there is int8$"):
        Captioner.load(f"{out}:fp32")


@pytest.mark.parametrize("told", ["", "{", "[]", '{"files": [{"name": "encoder_model.onnx", "variant": ["int8"]}]}'])
def test_files_of_which_nothing_is_told_are_float32(gpt2, tmp_path, told):
    folder = shutil.copytree(gpt2, tmp_path / "o", ignore=shutil.ignore_patterns("onnx", "export.json"))
    for name in ("encoder_model.onnx", "decoder_model_merged.onnx"):
        shutil.copyfile(gpt2 / "onnx" / name, folder / name)
    if told:
        (folder / "export.json").write_text(told)
    assert Captioner.load(f"{folder}:fp32")
    with pytest.raises(UsageError, match=r"has no variant int8; there is fp32$"):
        Captioner.load(f"{folder}:int8")


def test_calibrated_encoders_quantise_by_fixed_ranges(tiny_captioner, export, tmp_path, samples, pictures):
    out = export(tiny_captioner, tmp_path / "c", int8=True, fp32=False, calibrate=str(samples[0].parent))
    kinds = Counter(node.op_type for node in model_of(out, "encoder_model_int8.onnx").graph.node)
    assert (kinds["QuantizeLinear"], kinds["DynamicQuantizeLinear"]) == (9, 0)
    assert len({one.text for one in Captioner.load(out).caption(pictures)}) > 1
    assert not list(out.rglob("calibration*"))


# ---- what cannot be


def test_other_families_are_refused_by_name(blip_captioner, export, tmp_path):
    with pytest.raises(ModelError, match="is a blip: only encoder-decoders"):
        export(blip_captioner, tmp_path / "b", onnx=True)
    assert not (tmp_path / "b").exists()


def test_settings_that_our_search_does_not_know_are_refused(export, tmp_path):
    model = write_tiny(tmp_path / "m")
    told = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**told, "bad_words_ids": [[3]]}))
    with pytest.raises(ModelError, match="bad_words_ids, which the ONNX engine does not know"):
        export(model, tmp_path / "b", onnx=True)
    assert not (tmp_path / "b").exists()


def test_an_encoder_that_masks_at_random_is_refused(tiny_captioner, export, tmp_path):
    settings = json.loads((tiny_captioner / "config.json").read_text())
    vision = transformers.ViTMAEConfig(**{**settings["encoder"], "model_type": "vit_mae"})
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        vision, transformers.GPT2Config(**settings["decoder"])
    )
    folder = shutil.copytree(tiny_captioner, tmp_path / "model")
    transformers.VisionEncoderDecoderModel(config).save_pretrained(folder)
    with pytest.raises(ModelError, match="makes something else of the same image each time"):
        export(folder, tmp_path / "e", onnx=True)
    assert not (tmp_path / "e").exists()


def test_there_is_no_pipeline_of_an_export(gpt2):
    with pytest.raises(UsageError, match="ONNX files only, which torch does not run"):
        pipeline("image-to-text", model=str(gpt2))
    with pytest.raises(ModelError, match="it gives no pipeline"):
        pipeline("image-to-text", model=str(gpt2), engine="onnx")


def test_engines_devices_and_variants_that_are_not_there(gpt2, tiny_captioner, export, tmp_path):
    with pytest.raises(UsageError, match="ONNX files only"):
        Captioner.load(gpt2, engine="torch")
    with pytest.raises(UsageError, match=r"gpt2 is int8, and not bfloat16; choose dtype auto$"):
        Captioner.load(gpt2, dtype="bfloat16")
    assert Captioner.load(f"{gpt2}:fp32", dtype="float32")
    with pytest.raises(UsageError, match="runs on the CPU"):
        Captioner.load(gpt2, device="cuda")
    with pytest.raises(ModelError, match="has no ONNX files") as raised:
        Captioner.load(tiny_captioner, engine="onnx")
    assert "--onnx` makes them" in raised.value.hint
    out = export(tiny_captioner, tmp_path / "o", fp16=True, fp32=False)
    with pytest.raises(UsageError, match="has no variant int8"):
        Captioner.load(f"{out}:int8")
    with pytest.raises(UsageError, match=r"o has no variant int4; there is fp16$"):
        Captioner.load(f"{out}:int4")


def test_a_folder_without_onnx_files_is_told_how_to_get_them(tiny_captioner, gpt2, tiny_diffusion, tmp_path):
    for variant in ("int8", "int7"):
        with pytest.raises(ModelError) as raised:
            Captioner.load(f"{tiny_captioner}:{variant}")
        said = f"{tiny_captioner} has no ONNX files; `dbcap export {tiny_captioner} --onnx` makes them"
        assert str(raised.value) == said
    gone = shutil.copytree(gpt2, tmp_path / "gone", ignore=shutil.ignore_patterns("onnx"))
    for model, engine in ((gone, "auto"), (gone, "onnx"), (f"{gone}:int8", "auto")):
        with pytest.raises(ModelError, match=r"gone has no ONNX files; .*: export the model again$"):
            Captioner.load(model, engine=engine)
    with pytest.raises(ModelError, match="is a diffusion pipeline, no captioner"):
        Captioner.load(tiny_diffusion, engine="onnx")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"decoder_start_token_id": 999_999}, "names the token 999999 to begin captions, and its decoder has"),
        ({"pad_token_id": -1}, "names the token -1 to fill up captions"),
        ({"eos_token_id": "."}, "names the token '.' to end captions"),
    ],
)
def test_tokens_that_are_none_are_one_line(gpt2, tmp_path, settings, said):
    folder = shutil.copytree(gpt2, tmp_path / "copy")
    told = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(told | settings))
    with pytest.raises(ModelError, match=said):
        Captioner.load(folder)


def test_a_damaged_file_is_one_line(gpt2, tmp_path):
    folder = shutil.copytree(gpt2, tmp_path / "copy")
    damaged = folder / "onnx" / "decoder_model_merged_int8.onnx"
    damaged.write_bytes(damaged.read_bytes()[:8])
    with pytest.raises(ModelError, match=r"decoder_model_merged_int8\.onnx has 8 bytes, and \d+ by its export\.json"):
        Captioner.load(folder)
    (folder / "export.json").unlink()
    with pytest.raises(ModelError, match=r"decoder_model_merged_int8\.onnx cannot be loaded"):
        Captioner.load(folder)


@pytest.mark.parametrize("gone", ["encoder_model_int8.onnx", "decoder_model_merged_int8.onnx"])
def test_half_a_variant_is_no_reason_for_another_one(gpt2, tmp_path, gone):
    folder = shutil.copytree(gpt2, tmp_path / "copy")
    (folder / "onnx" / gone).unlink()
    for model in (folder, f"{folder}:int8"):
        with pytest.raises(ModelError, match=rf"but not onnx/{gone}; it is an export and not whole"):
            Captioner.load(model)
    assert Captioner.load(f"{folder}:q4")
    (folder / "export.json").unlink()
    with pytest.raises(ModelError, match=rf"but not onnx/{gone}; copy it again"):
        Captioner.load(folder)
    for path in (folder / "onnx").glob("*_int8.onnx"):
        path.unlink()
    assert Captioner.load(folder)


def test_halves_of_two_models_are_refused(gpt2, export, tmp_path):
    folder = shutil.copytree(gpt2, tmp_path / "copy")
    other = export(write_tiny(tmp_path / "m", seed=1), tmp_path / "o", int8=True, fp32=False)
    shutil.copyfile(other / "onnx" / "encoder_model_int8.onnx", folder / "onnx" / "encoder_model_int8.onnx")
    with pytest.raises(ModelError, match="are not of one model"):
        Captioner.load(folder)


def test_the_tokenizer_of_another_model_makes_no_captions(gpt2, tiny_captioner, tmp_path, pictures):
    for number, model in enumerate((gpt2, tiny_captioner)):
        folder = shutil.copytree(model, tmp_path / str(number))
        told = json.loads((folder / "tokenizer.json").read_text())
        few = {word: token for word, token in told["model"]["vocab"].items() if token < 5}
        told["model"] |= {"vocab": few, "merges": []}
        (folder / "tokenizer.json").write_text(json.dumps(told))
        with pytest.raises(ModelError, match=rf"{number} does not know the token \d+, which the model made"):
            Captioner.load(folder).caption(pictures)


def test_the_models_own_settings_hold_for_the_export(gpt2):
    captioner = Captioner.load(gpt2)._captioner
    settings = captioner.defaults()
    assert settings["decoder_start_token_id"] == settings["eos_token_id"]
    assert captioner.capabilities.max_positions == 64
    assert Decoding().max_length == 16
    assert CaptionConfig(inputs=()).engine == "auto"
