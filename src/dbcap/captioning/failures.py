"""What transformers may refuse while a model works, as one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dbcap.errors import ModelError
from dbcap.models.memory import is_lack_of_memory


@contextlib.contextmanager
def model_errors(model: str) -> Iterator[None]:
    """Turn what `generate` makes of settings and decoders that dbcap does not know into one line.

    A lack of memory, which is a RuntimeError too, stays what it is.
    """
    try:
        yield
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        if is_lack_of_memory(error):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"transformers cannot caption with {model}: {first}", "its generation_config.json may ask for it"
        ) from error
