"""The loop closed: the starter models make images of 200 prompts and caption them. Is the caption the prompt?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("DBCAP_SHARED") or Path(__file__).parents[3] / "shared")
AT_LEAST = 0.94
"""What was measured when the models were trained: diffusers, the same seeds, sampler and guidance."""


def measure() -> dict[str, Any]:
    """Make image N of line N with seed N, in what `auto` chooses and in float32."""
    source = SHARED / "starter" / "prompts.txt"
    if not source.is_file():
        return {"rows": [], "text": [f"not measured: there is no {source}"]}
    prompts = source.read_text().splitlines()
    shares = {dtype: _share(prompts, dtype) for dtype in ("auto", "float32")}
    rows = [
        {
            "what": f"captions equal to their prompt, {len(prompts)} images, {dtype}",
            "value": f"{100 * share:.1f} %",
            "ratio": share,
            "at_least": AT_LEAST,
        }
        for dtype, share in shares.items()
    ]
    return {"shares": shares, "rows": rows}


def _share(prompts: list[str], dtype: str) -> float:
    with tempfile.TemporaryDirectory(prefix="dbcap-bench-") as name:
        folder = Path(name)
        requests = [{"prompt": prompt, "seed": number} for number, prompt in enumerate(prompts)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in requests))
        made = _run("generate", f"@{folder / 'prompts.jsonl'}", "--out", str(folder / "images"), "--dtype", dtype)
        told = _run("caption", str(folder / "images"), "--num-beams", "1", "--dtype", "float32")
    asked = {Path(one["path"]).name: one["job"]["prompt"] for one in made}
    found = {Path(one["path"]).name: one["caption"] for one in told}
    if len(asked) != len(prompts) or asked.keys() != found.keys():
        raise SystemExit(f"{len(asked)} images and {len(found)} captions of {len(prompts)} prompts")
    return sum(found[image] == prompt for image, prompt in asked.items()) / len(asked)


def _run(*words: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "dbcap", *words, "--profile", "starter", "--format", "jsonl"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]
