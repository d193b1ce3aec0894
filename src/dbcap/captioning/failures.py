"""What transformers may refuse while a model works, as one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dbcap.errors import ModelError


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
