"""A picture that Optimum makes of an exported pipeline: python generate_optimum.py FOLDER PROMPT STEPS SEED SIDE OUT.

Runs in an environment of its own: Optimum's ONNX Runtime classes need transformers 4.
"""

import sys

import numpy as np
import torch
from optimum.onnxruntime import ORTDiffusionPipeline

folder, prompt, steps, seed, side, out = sys.argv[1:]
pipeline = ORTDiffusionPipeline.from_pretrained(folder)
made = pipeline(
    prompt,
    num_inference_steps=int(steps),
    guidance_scale=3.0,
    generator=torch.Generator().manual_seed(int(seed)),
    height=int(side),
    width=int(side),
    output_type="np",
)
np.save(out, (made.images[0] * 255).round().astype(np.uint8))
