"""ONNX Runtime on the CPU: how dbcap opens a graph. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from dbcap.errors import ModelError


def opened(path: Path, threads: int, change: Callable[[Any], None] | None = None, *, keeps: bool = True) -> Any:
    """Return the session of a file, its graph changed in place by `change` before.

    With `keeps` memory stays reserved for the next run. Raises ModelError for a file that cannot be loaded.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that go on spinning after one graph take a core from the other graph's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.enable_cpu_mem_arena = options.enable_mem_pattern = keeps
    options.log_severity_level = 3
    try:
        model: Any = str(path)
        if change:
            loaded = onnx.load(path)
            change(loaded)
            model = loaded.SerializeToString()
            del loaded
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # a class of its own for each kind of fault, all direct children of Exception
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path} cannot be loaded: {first}", "export the model again") from error
