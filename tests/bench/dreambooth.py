"""`dbcap train` against the components and settings of diffusers' example `train_dreambooth.py --train_text_encoder`.

SD 1.5's size with random weights: 512x512, one photo and one class image a step, the whole denoiser and text encoder,
gradient checkpointing, clipping, AdamW. Theirs in float32, encoding pictures in each step as the example does. All
three see the same latents, noise, times and captions, so that losses can be laid side by side. And the starter model:
100 steps of each for the curves, and the whole command for 400 steps of 4 and 4.
"""

from __future__ import annotations

import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import full_size_diffusion
import numpy as np
from PIL import Image

import dbcap_starter
from dbcap.models import cpu

STEPS, CURVE = 5, 100
SPEED = {"amx": 4.0}
SPEED_ELSE = 2.0
STARTER_MINUTES = 4.0
_ALONE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import dreambooth
print(json.dumps(dreambooth.example(sys.argv[2], int(sys.argv[3]))))
"""


def measure() -> dict[str, Any]:
    """Measure all of it, each in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="dbcap-bench-") as name, full_size_diffusion.folder() as large:
        place = Path(name)
        os.environ["DBCAP_HOME"] = str(place / "home")
        sizes = {"large": (large, 512, STEPS, 2e-6), "starter": (_starter(), 64, CURVE, 1e-5)}
        found: dict[str, dict[str, Any]] = {}
        for key, (model, size, steps, lr) in sizes.items():
            photos = _pictures(place / key, size)
            options = ["--model", str(model), "--size", str(size), "--steps", str(steps), "--lr", str(lr)]
            found[f"{key} dbcap"] = _ours(f"{key}-adamw", photos, [*options, "--optimizer", "adamw"])
            found[f"{key} dbcap 8-bit"] = _ours(f"{key}-8bit", photos, [*options, "--optimizer", "adamw8bit"])
            found[f"{key} example"] = _example(f"{key}-adamw", steps)
        minutes = _whole_starter(place)
    theirs, ours, small = (found[f"large {one}"] for one in ("example", "dbcap", "dbcap 8-bit"))
    rows = [
        {
            "what": "seconds a step of SD 1.5's size, the example's against ours",
            "value": f"{ours['seconds']:.1f} s",
            "ratio": theirs["seconds"] / ours["seconds"],
            "at_least": SPEED.get(cpu.cpu_class(), SPEED_ELSE),
        },
        _memory("its peak memory against the example's, AdamW", ours, theirs, 1.0),
        _memory("its peak memory against the example's, 8-bit AdamW", small, theirs, 0.8),
        {
            "what": "starter: 400 steps of 4 and 4 images, the whole command, against 4 minutes",
            "value": f"{minutes:.1f} min",
            "ratio": minutes / STARTER_MINUTES,
            "at_most": 1.0,
        },
    ]
    text = [
        "| SD 1.5's size | seconds a step | peak memory |",
        "|---|---|---|",
        *(
            f"| {name} | {one['seconds']:.1f} | {one['peak_mib']:.0f} MiB |"
            for name, one in (("example, float32", theirs), ("dbcap", ours), ("dbcap, 8-bit AdamW", small))
        ),
        *("", "losses, SD 1.5's size, step by step:", *_curves(found, "large", 1)),
        *("", "losses, starter, means of 20 steps:", *_curves(found, "starter", 20)),
    ]
    return {"found": found, "starter_minutes": minutes, "rows": rows, "text": text}


def _memory(what: str, ours: dict[str, Any], theirs: dict[str, Any], bar: float) -> dict[str, Any]:
    ratio = ours["peak_mib"] / theirs["peak_mib"]
    return {"what": what, "value": f"{ours['peak_mib']:.0f} MiB", "ratio": ratio, "at_most": bar}


def _curves(found: dict[str, dict[str, Any]], key: str, width: int) -> list[str]:
    lines = []
    for name in ("example", "dbcap", "dbcap 8-bit"):
        losses = found[f"{key} {name}"]["losses"]
        means = [statistics.fmean(losses[at : at + width]) for at in range(0, len(losses), width)]
        lines.append(f"  {name:<12} " + " ".join(f"{value:.5f}" for value in means))
    return lines


def _starter() -> Path:
    return Path(dbcap_starter.__file__).parent / "diffusion"


def _pictures(folder: Path, size: int) -> Path:
    """Write a photo and a class image of soft noise."""
    for number, name in enumerate(("photos", "class")):
        (folder / name).mkdir(parents=True)
        noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC).save(folder / name / "0.png")
    return folder


def _ours(name: str, pictures: Path, options: list[str]) -> dict[str, Any]:
    """Train by the command, and return seconds a step, peak memory and losses."""
    words = ["train", str(pictures / "photos"), "--name", name, "--class-word", "dog", "--identifier", "sks"]
    never = [word for kind in ("checkpoint", "validate", "sample") for word in (f"--{kind}-every", "0")]
    command = ["--class-dir", str(pictures / "class"), "--gradient-checkpointing", "on", *never, *options]
    peak = _run([sys.executable, "-m", "dbcap", *words, *command])[1]
    with (Path(os.environ["DBCAP_HOME"]) / "runs" / name / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    seconds = statistics.median(float(row["seconds"]) for row in rows[1:])
    return {"seconds": seconds, "peak_mib": peak, "losses": [float(row["loss"]) for row in rows]}


def _example(name: str, steps: int) -> dict[str, Any]:
    out, peak = _run([sys.executable, "-c", _ALONE, str(Path(__file__).parent), name, str(steps)])
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found | {"peak_mib": peak}


def _whole_starter(place: Path) -> float:
    """Return the minutes of the command, class images being there already."""
    photos = _pictures(place / "whole", 64) / "photos"
    shared = ["--class-word", "crab", "--identifier", "sks", "--profile", "starter"]
    _run([sys.executable, "-m", "dbcap", "prep", str(photos), "--out", str(place / "set"), *shared])
    start = time.perf_counter()
    _run([sys.executable, "-m", "dbcap", "train", str(place / "set"), "--name", "whole", "--profile", "starter"])
    return (time.perf_counter() - start) / 60


def _run(command: list[str]) -> tuple[str, float]:
    """Run a command; returns its output and its peak memory in MiB."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command[:6])} ends with {process.returncode}")
        out.seek(0)
        return out.read(), _mib(usage)


def _mib(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def example(name: str, steps: int) -> dict[str, Any]:
    """Train as the example does, on what the run `name` of ours was shown."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    from dbcap import runs
    from dbcap.config.models import CommonConfig
    from dbcap.config.training import TrainConfig
    from dbcap.events import Silent
    from dbcap.models import families
    from dbcap.training import material
    from dbcap.training.data import Drawing, Micro
    from dbcap.training.session import Session

    run = runs.find(name)
    config = TrainConfig(**run.read()["config"])
    session = Session(run, config, CommonConfig(), Silent(), deadline=None)
    ready = session.prepare()
    shown = material.gather(ready.data, ready.classes, [], ready.local, config, "cpu", Silent())
    micro = Micro(shown.photos, shown.classes, Drawing(config.seed, 1, 1000, 0.0), 0)
    tokenizer = families.load(ready.local, "cpu", "float32")
    rows = torch.cat([tokenizer.token_rows(text, 1)[0] for text in shown.captions])
    folder = str(ready.local.folder)
    load = {"pretrained_model_name_or_path": folder, "torch_dtype": torch.float32}
    unet = UNet2DConditionModel.from_pretrained(**load, subfolder="unet")
    text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(**load, subfolder="vae").requires_grad_(False)
    schedule = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    unet.enable_gradient_checkpointing()
    text.activation_checkpointing_enable()
    unet.train(), text.train()
    parameters = [*unet.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=1e-2)
    pixels = torch.zeros(2, 3, ready.data.size, ready.data.size)
    took, losses = [], []
    for step in range(steps):
        start = time.perf_counter()
        vae.encode(pixels).latent_dist.sample()
        batch = micro.batch(step)
        noisy = schedule.add_noise(batch.clean, batch.noise, batch.times)
        told = text(rows[batch.captions])[0]
        predicted = unet(noisy, batch.times, encoder_hidden_states=told).sample
        halves = zip(predicted.chunk(2), batch.noise.chunk(2), strict=True)
        loss = sum(torch.nn.functional.mse_loss(a, b) for a, b in halves)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        took.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
    return {"seconds": statistics.median(took[1:]), "losses": losses}
