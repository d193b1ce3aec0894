"""What may fail while a model works, as one line each."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from dbcap.errors import DbcapError, ModelError


@contextlib.contextmanager
def memory_errors(images: int, beams: int, option: str = "--batch-size") -> Iterator[None]:
    """Turn a lack of memory, for which torch has a RuntimeError on CPU and GPU, into one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("memory|alloc", str(error)):
            raise
        raise DbcapError(
            f"there is not enough memory for {images} images x {beams} beams",
            f"use a smaller {option} or fewer beams",
        ) from error


@contextlib.contextmanager
def model_errors(model: str) -> Iterator[None]:
    """Turn what `generate` refuses of a model's own settings, which dbcap does not know, into one line."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"transformers cannot caption with {model}: {first}", "its generation_config.json may ask for it"
        ) from error


@contextlib.contextmanager
def compiler_errors() -> Iterator[None]:
    """Turn a failure of torch.compile, of which there are as many as compilers, into one line."""
    try:
        yield
    except RuntimeError as error:
        if "TorchDynamoException" not in {kind.__name__ for kind in type(error).__mro__}:  # do not load all of it
            raise
        raise DbcapError(
            f"torch.compile failed: {str(error).strip().splitlines()[0]}", "go on without --compile"
        ) from error
