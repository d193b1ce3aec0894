"""ONNX Runtime on the CPU: how dbcap opens a graph. Nothing here imports torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from dbcap.errors import ModelError
from dbcap.models.memory import is_lack_of_memory

_AGAIN = "export the model again"


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
    options.log_severity_level = 4  # what goes wrong is raised too
    try:
        model: Any = str(path)
        if change:
            loaded = onnx.load(path)
            change(loaded)
            model = loaded.SerializeToString()
            del loaded
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # a class of its own for each kind of fault, all direct children of Exception
        raise ModelError(f"{path} cannot be loaded: {_first_line(error)}", _AGAIN) from error


def check(session: Any, path: Path, inputs: Collection[str], outputs: Collection[str]) -> None:
    """Raise ModelError for a graph that wants something else than `inputs`, or does not give `outputs`."""
    given = [one.name for one in session.get_outputs()]
    wrong = [f"it asks for {one.name}" for one in session.get_inputs() if one.name not in inputs]
    wrong += [f"it does not give {name}" for name in outputs if name not in given]
    if wrong:
        raise ModelError(f"{path} is not what dbcap or Optimum export: {wrong[0]}", _AGAIN)


@contextlib.contextmanager
def run_errors(path: Path) -> Iterator[None]:
    """Turn what ONNX Runtime raises while it runs a file into a ModelError; a lack of memory stays what it is."""
    try:
        yield
    except Exception as error:
        if is_lack_of_memory(error):
            raise
        raise ModelError(f"{path} cannot be run: {_first_line(error)}", _AGAIN) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
