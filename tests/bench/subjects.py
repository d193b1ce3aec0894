"""DreamBooth on the starter model: five subjects that it never saw, with each way of keeping the class.

For each subject 66 images of it (11 background colours, 6 seeds) and 66 of its class, of the base model and after each
training. An image's feature is the L2-normalised mean over all positions of the captioner encoder's last hidden state.
`bars` are what was measured when the starter models were made, with other code.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, VisionEncoderDecoderModel

import dbcap_starter

SHARED = Path(os.environ.get("DBCAP_SHARED") or Path(__file__).parents[3] / "shared")
COLOURS = "white black red green blue yellow orange purple pink brown gray".split()  # noqa: SIM905 - readable
SEEDS, WORD = 6, "sks"
BARS = {
    "base": (0.151, 1.00, 0.916),
    "prediction": (0.815, 1.00, 0.854),
    "images": (0.804, 1.00, 0.862),
    "none": (0.806, 1.00, 0.610),
}
"""Way -> subject score, share of right background colours, share of class prompts that caption as their class."""
ROOM = (0.03, 0.06, 0.06)
_CAPTION = re.compile(r"a (?:3d render|flat drawing) of an? (?P<name>.+) on an? (?P<colour>\w+) background")


def measure() -> dict[str, Any]:
    """Train, generate and compare. `DBCAP_BENCH_HOME` keeps the runs, and what is there is not made again."""
    subjects = SHARED / "starter" / "subjects"
    if not subjects.is_dir():
        return {"rows": [], "text": [f"not measured: there is no {subjects}"]}
    with tempfile.TemporaryDirectory(prefix="dbcap-bench-") as name:
        home = Path(os.environ.get("DBCAP_BENCH_HOME") or name)
        os.environ["DBCAP_HOME"] = str(home / "dbcap")
        found = [_Subject(folder, home).measured() for folder in sorted(subjects.iterdir())]
    table = {way: _mean([one[way] for one in found]) for way in BARS}
    rows = []
    for way, bars in BARS.items():
        for number, (what, bar) in enumerate(
            zip(("subject score", "right colours", "class captions"), bars, strict=True)
        ):
            value = table[way][number]
            rows.append(
                {
                    "what": f"{way}: {what}",
                    "value": f"{value:.3f}",
                    "ratio": value,
                    "at_least": round(bar - ROOM[number], 3),
                }
            )
    text = [
        "| prior | subject score | colour right | class captions | like the base's own | like the subject |",
        "|---|---|---|---|---|---|",
        *(f"| {way} | " + " | ".join(f"{value:.3f}" for value in table[way]) + " |" for way in BARS),
    ]
    return {"subjects": found, "table": table, "rows": rows, "text": text}


def _mean(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]


class _Subject:
    def __init__(self, folder: Path, home: Path) -> None:
        self._folder, self._home = folder, home
        self._class = (folder / "class.txt").read_text().strip()
        self._class_prompts = (folder / "class_prompts.txt").read_text().splitlines()
        self._encoder = _Encoder()
        self._real = {c: self._encoder.feature(folder / "real" / f"{c}.png") for c in COLOURS}

    def measured(self) -> dict[str, list[float]]:
        """Return the five figures of each way."""
        own: dict[str, torch.Tensor] = {}
        found = {}
        for way in BARS:
            model = "starter" if way == "base" else f"run:{self._trained(way)}"
            of_subject = [f"a 3d render of a {WORD} {self._class} on a {colour} background" for colour in COLOURS]
            pictures = self._made(way, "subject", model, of_subject)
            scores = [self._encoder.feature(path) @ self._real[colour] for path, colour, _ in pictures]
            right = [said["colour"] == colour for _, colour, said in pictures]
            classes = self._made(way, "class", model, self._class_prompts)
            kept = [said["name"] == self._class for _, _, said in classes]
            features = {path.name: self._encoder.feature(path) for path, _, _ in classes}
            own = own or features
            like_base = [features[name] @ own[name] for name in features]
            like_subject = [features[path.name] @ self._real[colour] for path, colour, _ in classes]
            found[way] = [_share(one) for one in (scores, right, kept, like_base, like_subject)]
            print(f"{self._folder.name} {way}: " + " ".join(f"{value:.3f}" for value in found[way]), flush=True)
        return found

    def _trained(self, way: str) -> str:
        name = f"{self._folder.name.replace('_', '-')}-{way}"
        if not (self._home / "dbcap" / "runs" / name / "final").is_dir():
            words = [str(self._folder / "train"), "--name", name, "--class-word", self._class, "--identifier", WORD]
            prompts = ["--class-prompts", str(self._folder / "class_prompts.txt")]
            quiet = ["--sample-every", "0", "--validate-every", "0", "--checkpoint-every", "0"]
            _run("train", *words, *prompts, "--prior", way, *quiet)
        return name

    def _made(self, way: str, kind: str, model: str, prompts: list[str]) -> list[tuple[Path, str, dict[str, str]]]:
        """Return path, colour that was asked for and what the caption says of each picture."""
        out = self._home / self._folder.name / way / kind
        made = _run("generate", *prompts, "-n", str(SEEDS), "--model", model, "--out", str(out), "--format", "jsonl")
        told = _run("caption", str(out), "--num-beams", "1", "--dtype", "float32", "--format", "jsonl")
        said = {Path(one["path"]).name: one["caption"] for one in map(json.loads, told)}
        found = []
        for one in map(json.loads, made):
            path, colour = Path(one["path"]), one["job"]["prompt"].split()[-2]
            match = _CAPTION.fullmatch(said[path.name])
            found.append((path, colour, match.groupdict() if match else {"name": "", "colour": ""}))
        if len(found) != SEEDS * len(prompts):
            raise SystemExit(f"{len(found)} images of {SEEDS * len(prompts)}")
        return found


class _Encoder:
    def __init__(self) -> None:
        folder = Path(dbcap_starter.__file__).parent / "captioner"
        self._model = VisionEncoderDecoderModel.from_pretrained(folder, dtype=torch.float32).encoder.eval()
        self._processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    @torch.inference_mode()
    def feature(self, path: Path) -> torch.Tensor:
        """Return the feature of a picture, (C,)."""
        pixels = self._processor(Image.open(path).convert("RGB"), return_tensors="pt").pixel_values
        mean = self._model(pixels).last_hidden_state[0].mean(0)
        return torch.nn.functional.normalize(mean, dim=0)


def _share(values: list[Any]) -> float:
    return float(sum(map(float, values)) / len(values))


def _run(*words: str) -> list[str]:
    command = [sys.executable, "-m", "dbcap", *words, "--profile", "starter"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"dbcap {' '.join(words)} ends with {done.returncode}: {done.stderr}")
    return done.stdout.splitlines()
