"""A captioner as a folder of ONNX graphs, with the configuration and tokenizer that runtimes read beside them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers
from PIL import Image

from dbcap import images
from dbcap.captioning.loading import foreign_settings, load_weights
from dbcap.captioning.preprocessing import Preprocessing
from dbcap.errors import ModelError
from dbcap.exporting import calibrate, graphs, onnx_file, quantise
from dbcap.exporting.quantise import LEAST_SHARE, Ranges
from dbcap.exporting.written import Written
from dbcap.models.exported import EXTERNAL, FOLDER, MODEL, files_of
from dbcap.models.hub import LocalModel
from dbcap.models.layout import read_object
from dbcap.models.libraries import clear_errors, quiet_libraries

JS = "transformers.js_config"
SHAPES = ((37, 61), (224, 224), (500, 333))
"""Of the pictures that preprocessing is compared with."""


class CaptionerExport:
    """A loaded captioner, and the graphs that are made of it."""

    def __init__(self, local: LocalModel) -> None:
        """Load it. Raises ModelError for a model that is no `VisionEncoderDecoderModel` or cannot be exported."""
        self._name, folder = local.spec.text, local.folder
        kind = read_object(folder / "config.json").get("model_type")
        if kind != "vision-encoder-decoder":
            raise ModelError(f"{self._name} is a {kind}: only encoder-decoders are exported to ONNX")
        loaded = load_weights(transformers.VisionEncoderDecoderModel, folder, self._name, torch.float32)
        self._model, self._weights = loaded.model, loaded.weights
        if foreign := foreign_settings(self._model.generation_config):
            raise ModelError(
                f"the generation config of {self._name} has {foreign[0]}, which the ONNX engine does not know",
                "take it out of a copy of the model",
            )
        with clear_errors(self._name):
            processors = transformers.AutoImageProcessor
            self._processor = processors.from_pretrained(folder, backend="pil", local_files_only=True)
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._config = self._model.config
        self._generation = self._model.generation_config
        self._encoder, self._decoder = graphs.make(self._model, self._name)
        for graph in (self._encoder, self._decoder):
            graph.metadata_props[MODEL] = local.revision
        self._release()

    def write(self, folder: Path, variants: Sequence[str], layout: str, calibration: Sequence[str]) -> list[Written]:
        """Write everything; the encoder is quantised by what it makes of the `calibration` images, if there are any.

        Raises ModelError where too little of a part could be quantised, InputError for an image that cannot be read.
        """
        ranges = self._measured(calibration, folder) if calibration else None
        written: list[Written] = []
        place = folder / FOLDER if layout == "transformers.js" else folder
        place.mkdir(exist_ok=True)
        encoders: dict[str, Written] = {}
        for variant in variants:
            names = files_of("fp32" if layout == "optimum" else variant)
            same = encoders.get("int8" if variant == "q4" else variant)
            if same:
                _link(folder / same.name, place / names[0])
                first = Written(_inside(place / names[0], folder), variant, same.share)
            else:
                first = self._half(self._encoder, place / names[0], folder, variant, ranges)
                encoders["int8" if variant == "q4" else variant] = first
            written += [first, self._half(self._decoder, place / names[1], folder, variant)]
        if layout == "transformers.js":
            written += _aliases(folder, place, written)
        self._write_rest(folder, list(place.glob(f"*{EXTERNAL}")))
        return written

    def _measured(self, calibration: Sequence[str], folder: Path) -> Ranges:
        ours = Preprocessing.of(self._processor.to_dict(), self._name)
        pixels = (ours(images.read(path).image) for path in calibration)
        return calibrate.measure(self._encoder, pixels, folder / "calibration.onnx")

    def _half(self, graph: ir.Model, path: Path, folder: Path, variant: str, ranges: Ranges | None = None) -> Written:
        """Write the encoder or the decoder in a variant."""
        model, share = graph.clone(), None
        if variant in ("int8", "q4"):
            if graph is self._encoder:
                share = quantise.encoder(model, ranges)
            else:
                share = quantise.decoder(model, 4 if variant == "q4" else 8)
            if share.of_all < LEAST_SHARE:
                raise ModelError(
                    f"{self._name}: only {share.of_all:.0%} of the weights of {path.name} could be quantised",
                    "its layers are of a kind that dbcap does not know; export it with --onnx",
                )
        self._release()
        _save(model, path, self._release, half=variant == "fp16")
        return Written(_inside(path, folder), variant, share)

    def _release(self) -> None:
        """Give back what was read of the file: its weights count as memory as soon as they are looked at."""
        self._weights.release()

    def _write_rest(self, folder: Path, external: Iterable[Path]) -> None:
        """Write configuration, tokenizer and processor, with all that runtimes would otherwise take from defaults."""
        with quiet_libraries():
            self._tokenizer.save_pretrained(folder)
            self._generation.save_pretrained(folder)
        config = self._config.to_dict()
        config["architectures"] = ["VisionEncoderDecoderModel"]
        if large := sorted(path.name.removesuffix(EXTERNAL) for path in external):
            config[JS] = {"use_external_data_format": dict.fromkeys(large, 1)}
        processor = self._processor.to_dict()
        _compare_preprocessing(self._processor, processor, self._name)
        for name, document in (("config.json", config), ("preprocessor_config.json", processor)):
            (folder / name).write_text(json.dumps(document, indent=2, default=str) + "\n", "utf-8")


def _inside(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _aliases(folder: Path, place: Path, written: Sequence[Written]) -> list[Written]:
    """Give the int8 files their other name: what a browser asks for when nothing is said."""
    made = []
    for one in written:
        if one.variant == "int8":
            path = folder / one.name
            other = place / path.name.replace("_int8", "_quantized")
            _link(path, other)
            made.append(Written(_inside(other, folder), one.variant, one.share))
    return made


def _link(path: Path, other: Path) -> None:
    try:
        os.link(path, other)
    except OSError:  # a file system without links
        shutil.copyfile(path, other)


def _save(model: ir.Model, path: Path, release: Callable[[], None], half: bool) -> None:
    if half:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        with quiet_libraries():
            model = ir.from_proto(convert_float_to_float16(ir.to_proto(model), keep_io_types=True))
            model.graph.sort()  # the conversion appends nodes that others need before
    onnx_file.save(model, path, release)


def _compare_preprocessing(processor: Any, config: dict[str, Any], name: str) -> None:
    """Raise ModelError where our preprocessing, which needs no torch, gives other pixels than the model's own."""
    ours = Preprocessing.of(config, name)
    numbers = np.random.default_rng(0)
    for height, width in SHAPES:
        image = Image.fromarray(numbers.integers(0, 256, (height, width, 3), np.uint8))
        expected = processor(images=image, return_tensors="np")["pixel_values"][0]
        if not np.array_equal(ours(image), np.asarray(expected, np.float32)):
            raise ModelError(f"the image processor of {name} does more than resizing, cropping and normalising")
