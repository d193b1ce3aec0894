"""The whole way of `dbcap export`: locate > load > write > prove > publish > report."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbcap import __version__
from dbcap.config.models import CommonConfig, ExportConfig
from dbcap.config.paths import cache_dir
from dbcap.errors import SIGINT, DbcapError, Interrupted
from dbcap.events import Events
from dbcap.exporting.publish import MANIFEST, refuse, whole_folder
from dbcap.files import sha256_of
from dbcap.inputs import shown
from dbcap.models import cpu, hub

if TYPE_CHECKING:
    from dbcap.exporting.captioner import Written
    from dbcap.exporting.proof import Proof
    from dbcap.models.hub import LocalModel

WORTH_A_WARNING = 0.05
LIBRARIES = ("onnx", "onnxruntime", "onnxscript", "torch", "transformers")


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


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    output: Path
    files: tuple[File, ...]
    exit_code: int = 0
    summary: str = ""


def run(config: ExportConfig, common: CommonConfig, events: Events, captioner: str) -> ExportReport:
    """Export a model as `dbcap export` does; `captioner` is taken where none is named. Raises DbcapError."""
    text = config.models[0] if config.models else captioner
    out = Path(config.out) if config.out else Path(f"{_name_of(text)}-export")
    refuse(out, config.force)
    local = hub.locate(text, offline=common.offline, allow_pickle=common.allow_pickle, events=events, home=cache_dir())
    try:
        return _captioner(config, common, events, local, out)
    except (KeyboardInterrupt, Interrupted) as error:
        code = error.exit_code if isinstance(error, Interrupted) else SIGINT
        raise Interrupted(code, f"nothing was written to {shown(str(out))}") from None


def _name_of(text: str) -> str:
    """Return the last part of a model's address: org/name@main -> name, run:dog@80 -> dog, a/b.safetensors -> b."""
    name = text.removeprefix("run:").partition("@")[0].rstrip("/")
    return Path(name).name.removesuffix(".safetensors") or Path(name).absolute().name


def _captioner(
    config: ExportConfig, common: CommonConfig, events: Events, local: LocalModel, out: Path
) -> ExportReport:
    from dbcap.exporting import proof
    from dbcap.exporting.captioner import CaptionerExport

    images = proof.check_images(config.check_images) if config.check else []
    if config.check and not images:
        events.say("captions are not compared: name images by --check-images, or install dbcap-starter")
    calibration = proof.images_in(config.calibrate, 1) if config.calibrate else ()
    with whole_folder(out, config.force) as folder:
        start = time.perf_counter()
        before = proof.baseline(local.spec.text, images, common.allow_pickle) if images else None
        events.detail(f"captions in float32: {time.perf_counter() - start:.1f} s")
        start = time.perf_counter()
        model = CaptionerExport(local)
        written = model.write(folder, config.variants, config.layout, calibration)
        del model
        events.detail(f"exporting and quantising: {time.perf_counter() - start:.1f} s")
        proofs: dict[str, Proof] = {}
        if before:
            tried = config.variants if config.layout == "transformers.js" else ("fp32",)
            proofs = proof.prove(tried, folder, images, before, events)
            if config.layout == "optimum":
                proofs = {config.variants[0]: proofs["fp32"]}
            _judge(proofs, config.max_drop, events)
        files = _facts(folder, written, proofs)
        _write_manifest(folder, config, local, files, proofs, images)
    return ExportReport(out, files)


def _judge(proofs: Mapping[str, Proof], most: float | None, events: Events) -> None:
    """Raise DbcapError where a variant changes more captions than it may, else warn of many."""
    for variant, one in proofs.items():
        drop = 1 - one.captions
        told = f"{drop:.1%} of the captions of {variant} differ from those of float32"
        if most is not None and drop > most:
            raise DbcapError(f"{told}, and --max-drop allows {most:.1%}", "nothing was written")
        if most is None and drop > WORTH_A_WARNING:
            events.warn(told)


def _facts(folder: Path, written: Sequence[Written], proofs: Mapping[str, Proof]) -> tuple[File, ...]:
    plain = {_part(one.name): (folder / one.name).stat().st_size for one in written if one.variant == "fp32"}
    files = []
    for one in written:
        path = folder / one.name
        file = File(one.name, one.variant, path.stat().st_size, sha256_of(path))
        if (part := _part(one.name)) in plain:
            file = replace(file, ratio=file.size / plain[part])
        if one.variant in proofs:
            proof = proofs[one.variant]
            file = replace(file, agreement=proof.captions, latency=proof.latency)
        files.append(replace(file, quantised=one.share.of_all if one.share else None))
    return tuple(files)


def _part(name: str) -> str:
    """Return which half of the model a file is."""
    return "encoder" if "encoder_model" in name else "decoder"


def _write_manifest(
    folder: Path,
    config: ExportConfig,
    local: LocalModel,
    files: Sequence[File],
    proofs: Mapping[str, Proof],
    images: Sequence[str],
) -> None:
    """Write export.json: what this is, what of, with what, and the proof."""
    document: dict[str, Any] = {
        "dbcap": __version__,
        "model": {"name": local.spec.text, "revision": local.revision},
        "settings": config.model_dump(mode="json", exclude={"models", "out", "force"}),
        "files": [asdict(file) for file in files],
        "check": {
            "images": len(images),
            "decoding": "the model's own settings; next_tokens, latency and memory greedily, one image at a time",
            "variants": {variant: asdict(one) for variant, one in proofs.items()},
        }
        if proofs
        else None,
        "made with": {name: version(name) for name in LIBRARIES},
        "host": {
            "system": platform.system(),
            "cpu": cpu.cpu_name(),
            "cpu_class": cpu.cpu_class(),
            "cores": cpu.cores(),
        },
    }
    (folder / MANIFEST).write_text(json.dumps(document, indent=2) + "\n", "utf-8")
