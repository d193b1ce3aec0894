"""A Python with Optimum's ONNX Runtime classes, which need transformers 4: made once, in `.interop/`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PLACE = ROOT / ".interop"
OPTIMUM = ("optimum-onnx==0.1.0", "transformers==4.57.3", "onnxruntime>=1.32,<2", "torch>=2.13,<3", "pillow")


def execute(*words: Any, where: Path = PLACE, **more: Any) -> str:
    """Run a command, which must succeed; returns what it prints."""
    done = subprocess.run([str(word) for word in words], cwd=where, capture_output=True, text=True, **more)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def optimum() -> Path:
    """Return the interpreter."""
    folder = PLACE / "optimum"
    if not (folder / "ready").is_file():
        PLACE.mkdir(exist_ok=True)
        execute(sys.executable, "-m", "venv", folder)
        pip = (folder / "bin" / "python", "-m", "pip", "install", "--quiet")
        execute(*pip, "--constraint", ROOT / "constraints.txt", "torch")
        execute(*pip, *OPTIMUM)
        (folder / "ready").touch()
    return folder / "bin" / "python"
