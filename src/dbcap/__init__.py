"""dbcap: caption, prepare, train, generate and export personal image models.

`from dbcap import Captioner, pipeline` captions from Python. These names are loaded at first use (PEP 562), so that
`import dbcap` stays cheap and never loads torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbcap.captioning.api import Caption, Captioner
    from dbcap.captioning.pipeline import pipeline

__version__ = "0.1.0"
__all__ = ["Caption", "Captioner", "__version__", "pipeline"]

_HOMES = {
    "Caption": "dbcap.captioning.api",
    "Captioner": "dbcap.captioning.api",
    "pipeline": "dbcap.captioning.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dbcap' has no attribute {name!r}")
    from importlib import import_module

    globals()[name] = getattr(import_module(_HOMES[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
