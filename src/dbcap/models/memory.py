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
        of_runtime = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")
        if not isinstance(error, MemoryError) and not (of_runtime and re.search("memory|alloc", str(error))):
            raise
        raise DbcapError(f"there is not enough memory for {what}", hint) from error
