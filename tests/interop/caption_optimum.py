"""Tokens that Optimum makes with an exported captioner: python caption_optimum.py FOLDER PIXELS.json BEAMS.

Runs in an environment of its own: Optimum's ONNX Runtime classes need transformers 4.
"""

import json
import sys
from pathlib import Path

import torch
from optimum.onnxruntime import ORTModelForVision2Seq

folder, file, beams = sys.argv[1:]
told = json.loads(Path(file).read_text())
pixels = torch.tensor(told["data"]).reshape(told["dims"])
model = ORTModelForVision2Seq.from_pretrained(folder)
ids = model.generate(pixel_values=pixels, max_new_tokens=told["max_new_tokens"], num_beams=int(beams), do_sample=False)
json.dump(ids.tolist(), sys.stdout)
