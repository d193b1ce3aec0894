"""What an export wrote: files and their facts, in the report and in the manifest."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbcap import __version__
from dbcap.config.models import ExportConfig
from dbcap.exporting.publish import CONTENTS, HEADER, files_in
from dbcap.files import sha256_of
from dbcap.models import cpu
from dbcap.models.exported import MANIFEST

if TYPE_CHECKING:
    from dbcap.models.hub import LocalModel

LIBRARIES = ("diffusers", "onnx", "onnxruntime", "onnxscript", "torch", "transformers")


@dataclass(frozen=True)
class File:
    """A file with weights that was written."""

    name: str
    variant: str
    size: int
    sha256: str
    ratio: float | None = None
    """Its size over that of the same part in float32."""
    quantised: float | None = None
    """Share of the numbers in its matrices that was quantised."""
    agreement: float | None = None
    """Share of the variant's captions that are those of float32."""
    latency: float | None = None
    """Seconds an image of the variant."""

    @classmethod
    def of(cls, path: Path, name: str, variant: str, **facts: Any) -> File:
        """Return what there is to say of a file by itself, and other facts."""
        return cls(name, variant, path.stat().st_size, sha256_of(path), **facts)


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    output: Path
    files: tuple[File, ...]
    exit_code: int = 0
    summary: str = ""


def write_manifest(
    folder: Path, config: ExportConfig, local: LocalModel, files: Sequence[File], check: Mapping[str, Any] | None = None
) -> None:
    """Write export.json: what this is, what of, with what, and the proof."""
    document: dict[str, Any] = {
        **_source(local.spec.text, local.revision),
        "settings": config.model_dump(mode="json", exclude={"models", "out", "force"}),
        "files": [asdict(file) for file in files],
        CONTENTS: sorted({*files_in(folder), MANIFEST}),
        "check": check,
        "made with": {name: version(name) for name in LIBRARIES},
        "host": {
            "system": platform.system(),
            "cpu": cpu.cpu_name(),
            "cpu_class": cpu.cpu_class(),
            "cores": cpu.cores(),
        },
    }
    (folder / MANIFEST).write_text(json.dumps(document, indent=2) + "\n", "utf-8")


def header(name: str, revision: str) -> dict[str, str]:
    """Return what the header of a single file says instead of a manifest."""
    return {HEADER: json.dumps(_source(name, revision))}


def _source(name: str, revision: str) -> dict[str, Any]:
    return {"dbcap": __version__, "model": {"name": name, "revision": revision}}
