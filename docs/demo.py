"""`make demo`: the loop on the models that come along. Each step is a command that you can type yourself."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import dbcap_starter

SAMPLES = dbcap_starter.samples()
STARTER = ("--profile", "starter")
RUN = ("--steps", "60", "--checkpoint-every", "20", "--validate-every", "20", "--sample-every", "0")


def step(title: str, *words: str, folder: Path, interrupt_at: int = 0) -> None:
    """Show a command and run it in a folder; with `interrupt_at` press Ctrl-C once that step is done."""
    print(f"\n# {title}\n$ dbcap {shlex.join(words)}", flush=True)
    command = subprocess.Popen([sys.executable, "-m", "dbcap", *words], cwd=folder)
    if interrupt_at:
        metrics = Path(os.environ["DBCAP_HOME"]) / "runs" / "rex" / "metrics.csv"
        while command.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") > interrupt_at):
            time.sleep(0.2)
        command.send_signal(signal.SIGINT)
    code = command.wait()
    if code != (130 if interrupt_at else 0):
        raise SystemExit(f"dbcap {shlex.join(words)} ends with {code}")


def captions(folder: Path) -> None:
    """Caption the shipped samples in the ways that people need most."""
    images = sorted(path.name for path in SAMPLES.glob("*.png"))
    output = folder / "captions.jsonl"
    step("One image, one caption", "caption", images[0], *STARTER, folder=SAMPLES)
    step("Several", "caption", *images[1:7], *STARTER, folder=SAMPLES)
    step("A folder into a file", "caption", ".", *STARTER, "-f", "jsonl", "-o", str(output), folder=SAMPLES)
    print(f"\n{len(output.read_text().splitlines())} captions in {output.name}")


def training(folder: Path) -> None:
    """Teach the model the thing in one picture, with Ctrl-C on the way."""
    photos = folder / "photos"
    photos.mkdir()
    shutil.copy(SAMPLES / "000.png", photos)
    (photos / "000.txt").write_text("a flat drawing of a [V] {class} on a pink background\n")
    few = ("--class-images", "22")
    words = ("photos", "--class-word", "birthday cake", *few, "--out", "rex", *STARTER)
    step("Photos become a data set", "prep", *words, folder=folder)
    step("Training, and Ctrl-C on the way", "train", "rex", "--name", "rex", *few, *RUN, *STARTER,
         folder=folder, interrupt_at=25)  # fmt: skip
    step("It goes on, exact to the bit", "resume", "rex", folder=folder)
    step("What there is", "runs", "list", folder=folder)
    prompt = "a 3d render of a [V] {class} on a blue background"
    step("Pictures of the subject", "generate", prompt, "--model", "run:rex", *STARTER, "-n", "4", folder=folder)


def main() -> None:
    """Go once around."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["DBCAP_HOME"] = str(folder / "home")
        captions(folder)
        prompt = "a 3d render of a red apple on a blue background"
        step("Images from a prompt", "generate", prompt, *STARTER, "-n", "4", "--seed", "1", folder=folder)
        step("What the captioner sees in them", "caption", "outputs", *STARTER, folder=folder)
        training(folder)
    print("\n`dbcap caption --help`, `dbcap train --help` and `dbcap generate --help` have the rest.")


if __name__ == "__main__":
    main()
