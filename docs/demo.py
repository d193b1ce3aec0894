"""`make demo`: the loop on the models that come along. Each step is a command that you can type yourself."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import dbcap_starter

SAMPLES = dbcap_starter.samples()


def step(title: str, *words: str) -> None:
    """Show a command and run it, in the folder of the samples."""
    print(f"\n# {title}\n$ dbcap {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "dbcap", *words], check=True, cwd=SAMPLES)


def main() -> None:
    """Caption the shipped samples in the ways that people need most, then make pictures and caption those."""
    images = sorted(path.name for path in SAMPLES.glob("*.png"))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "captions.jsonl"
        step("One image, one caption", "caption", images[0], "--profile", "starter")
        step("Several", "caption", *images[1:7], "--profile", "starter")
        step(
            "Three candidates with scores",
            "caption",
            images[7],
            "--profile",
            "starter",
            "--num-captions",
            "3",
            "-f",
            "jsonl",
        )
        step("A folder into a file", "caption", ".", "--profile", "starter", "-f", "jsonl", "-o", str(output))
        print(f"\n{len(output.read_text().splitlines())} captions in {output.name}")
        out = str(Path(folder) / "outputs")
        prompt = "a 3d render of a red apple on a blue background"
        step("Images from a prompt", "generate", prompt, "--profile", "starter", "-n", "4", "--seed", "1", "-o", out)
        step("What the captioner sees in them", "caption", out, "--profile", "starter")
        step("Made already", "generate", prompt, "--profile", "starter", "-n", "4", "--seed", "1", "-o", out)
    print("\n`dbcap caption --help` and `dbcap generate --help` have the rest.")


if __name__ == "__main__":
    main()
