"""Optimum's int8 of a captioner, in an environment of its own (`tests/interop/environments.py`), by what it documents.

python optimum_int8.py export MODEL OUT     MODEL exported and quantised into OUT
python optimum_int8.py time OUT PIXELS.npy THREADS TOKENS     see `answer`
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForVision2Seq, ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig

PARTS = ("encoder_model.onnx", "decoder_model_merged.onnx")


def export(model: str, out: str) -> None:
    """Export to float32 and quantise to int8, per channel, for VNNI."""
    config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    with tempfile.TemporaryDirectory(prefix="dbcap-bench-") as place:
        main_export(model, output=place, task="image-to-text-with-past")
        for part in PARTS:
            ORTQuantizer.from_pretrained(place, file_name=part).quantize(config, out, file_suffix="")
        shutil.copy(Path(place) / "generation_config.json", out)


def answer(folder: str, pixels: str, threads: str, tokens: str) -> None:
    """Answer each line "IMAGES BEAMS" of stdin with the seconds that captioning as many of the pixels takes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    torch.set_num_threads(int(threads))
    model = ORTModelForVision2Seq.from_pretrained(folder, session_options=options)
    all_pixels = torch.from_numpy(np.load(pixels))
    forced = {"min_new_tokens": int(tokens), "max_new_tokens": int(tokens), "do_sample": False}
    print("ready", flush=True)
    for line in sys.stdin:
        images, beams = map(int, line.split())
        start = time.perf_counter()
        model.generate(pixel_values=all_pixels[:images], num_beams=beams, **forced)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    {"export": export, "time": answer}[sys.argv[1]](*sys.argv[2:])
