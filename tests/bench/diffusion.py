"""`dbcap generate` against diffusers' `StableDiffusionPipeline`, as its documentation starts it.

One image of SD 1.5's size, each in a process of its own: 512x512, 20 steps, guidance 7.5, the own scheduler. And
eight images of the starter model: the whole command against the pipeline alone, in a process that is warm.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import full_size_diffusion
from engine import own_peak_mib

import dbcap_starter
from dbcap.models import cpu

PROMPT = "a photo of a red apple on a wooden table"
STEPS, GUIDANCE = 20, 7.5
AT_LEAST = {"amx": 4.0}
AT_LEAST_ELSE = 1.8
MEMORY = 0.6
STARTER_IMAGES, STARTER_FACTOR, STARTER_START = 8, 1.3, 4.0

_ALONE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import diffusion
print(json.dumps(getattr(diffusion, sys.argv[2])(sys.argv[3])))
"""


def measure() -> dict[str, Any]:
    """Measure both models."""
    with full_size_diffusion.folder() as model:
        theirs, ours = _alone("pipeline", model), _alone("engine", model)
        command = _command(["--model", str(model), "--steps", str(STEPS), "--guidance", str(GUIDANCE)], 1)
    starter = Path(dbcap_starter.__file__).parent / "diffusion"
    warm = _alone("warm_pipeline", starter)["seconds"]
    eight = min(_command(["--profile", "starter"], STARTER_IMAGES) for _ in range(3))
    rows = [
        {
            "what": "one image of SD 1.5's size against the float32 pipeline",
            "value": f"{ours['seconds']:.1f} s",
            "ratio": theirs["seconds"] / ours["seconds"],
            "at_least": AT_LEAST.get(cpu.cpu_class(), AT_LEAST_ELSE),
        },
        {
            "what": "its peak memory against the pipeline's",
            "value": f"{ours['peak_mib']:.0f} MiB",
            "ratio": ours["peak_mib"] / theirs["peak_mib"],
            "at_most": MEMORY,
        },
        {
            "what": f"starter: the command for 8 images, less {STARTER_START:g} s, against a warm pipeline",
            "value": f"{eight:.1f} s",
            "ratio": (eight - STARTER_START) / warm,
            "at_most": STARTER_FACTOR,
        },
    ]
    text = [
        "| SD 1.5's size, 512x512, 20 steps | load | image | peak memory |",
        "|---|---|---|---|",
        *(
            f"| {name} | {one['load_s']:.1f} s | {one['seconds']:.1f} s | {one['peak_mib']:.0f} MiB |"
            for name, one in (("StableDiffusionPipeline, float32", theirs), (f"dbcap, {ours['dtype']}", ours))
        ),
        "",
        f"`dbcap generate`, from start to end: {command:.1f} s",
        f"starter, 8 images, 20 steps: pipeline in a warm process {warm:.2f} s, the whole command {eight:.2f} s",
    ]
    return {"pipeline": theirs, "dbcap": ours, "command_s": command, "rows": rows, "text": text}


def pipeline(folder: str) -> dict[str, Any]:
    """Load diffusers' pipeline and make one image."""
    start = time.perf_counter()
    loaded = _pipeline(folder)
    ready = time.perf_counter()
    loaded(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE)
    done = time.perf_counter()
    return {"load_s": ready - start, "seconds": done - ready, "peak_mib": own_peak_mib()}


def warm_pipeline(folder: str) -> dict[str, Any]:
    """Make eight images for the second time."""
    loaded = _pipeline(folder)
    for _ in range(2):
        start = time.perf_counter()
        loaded([PROMPT] * STARTER_IMAGES, num_inference_steps=20, guidance_scale=3.0)
        seconds = time.perf_counter() - start
    return {"seconds": seconds}


def engine(folder: str) -> dict[str, Any]:
    """Make one image as `dbcap generate` does, after the same start: its first image, packing included."""
    from dbcap.config.models import GenerateConfig
    from dbcap.events import Silent
    from dbcap.generation import plan
    from dbcap.generation.prompts import Request
    from dbcap.generation.renderer import Renderer
    from dbcap.models import device, families
    from dbcap.models.hub import LocalModel
    from dbcap.models.specs import parse

    start = time.perf_counter()
    local = LocalModel(parse(folder), Path(folder), "", ())
    choice = device.choose(parameters=local.parameters)
    family = families.load(local, choice.device, choice.dtype)
    config = GenerateConfig(prompts=(PROMPT,), steps=STEPS, guidance=GUIDANCE)
    planned = plan.make(config, [Request(PROMPT, "prompt 1", {})], family, "", plan.Given())
    planned = plan.measured(planned, family, Silent())
    renderer = Renderer(family, plan.Given(), config, Silent())
    _ = family.unet, family.vae
    ready = time.perf_counter()
    renderer.prepare(planned)
    renderer.pixels(renderer.latents(planned, lambda: None)[0])
    done = time.perf_counter()
    found = {"load_s": ready - start, "seconds": done - ready, "peak_mib": own_peak_mib()}
    return found | {"dtype": choice.dtype, "threads": choice.threads}


def _pipeline(folder: str) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline

    # The published files are float32; those of the starter model are not, and would be mixed with what is.
    loaded = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def _alone(what: str, folder: Path) -> dict[str, Any]:
    """Run one of these functions in a process of its own."""
    words = [sys.executable, "-c", _ALONE, str(Path(__file__).parent), what, str(folder)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _command(options: list[str], images: int) -> float:
    """Return the seconds that the command takes."""
    with tempfile.TemporaryDirectory(prefix="dbcap-bench-") as out:
        words = [sys.executable, "-m", "dbcap", "generate", PROMPT, "-n", str(images), "--out", out, *options]
        start = time.perf_counter()
        done = subprocess.run(words, check=True, capture_output=True)
        seconds = time.perf_counter() - start
    if (lines := done.stdout.count(b"\n")) != images:
        raise SystemExit(f"{lines} images of {images}")
    return seconds
