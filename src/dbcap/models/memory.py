"""A lack of memory, whichever library met it, as one line. Imports none of them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from dbcap.errors import DbcapError


@contextlib.contextmanager
def memory_errors(what: str, hint: str) -> Iterator[None]:
    """Turn a lack of memory, for which torch has a RuntimeError and ONNX Runtime errors of its own, into one line."""
    try:
        yield
    except DbcapError:
        raise
    except Exception as error:
        if not is_lack_of_memory(error):
            raise
        raise DbcapError(f"there is not enough memory for {what}", hint) from error


def is_lack_of_memory(error: Exception) -> bool:
    """Return whether that is what an error says, of torch's and ONNX Runtime's too."""
    of_runtime = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")
    return isinstance(error, MemoryError) or (of_runtime and bool(re.search("memory|alloc", str(error))))
