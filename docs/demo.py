"""`make demo`: the loop on the models that come along. Each step is a command that you can type yourself."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import dbcap_starter


def step(title: str, *words: str) -> None:
    """Show a command and run it."""
    print(f"\n# {title}\n$ dbcap {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "dbcap", *words], check=True)


def main() -> None:
    """Caption the shipped samples in the ways that people need most."""
    samples = dbcap_starter.samples()
    images = sorted(samples.glob("*.png"))
    with tempfile.TemporaryDirectory() as folder:
        step("One image, one caption", "caption", str(images[0]), "--profile", "starter")
        step("Several", "caption", *map(str, images[1:7]), "--profile", "starter")
        step("Three candidates with scores", "caption", str(images[7]), *"--profile starter --num-captions 3 --format jsonl".split())
        output = Path(folder) / "captions.jsonl"
        step("A folder into a file", "caption", str(samples), *"--profile starter --format jsonl -o".split(), str(output))
        print(f"\n{len(output.read_text().splitlines())} captions in {output.name}; `dbcap caption --help` has the rest.")


if __name__ == "__main__":
    main()
