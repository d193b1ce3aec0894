"""Exporting a captioner to ONNX, with the proof of what each variant costs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dbcap.config.models import CommonConfig, ExportConfig
from dbcap.errors import DbcapError, UsageError
from dbcap.events import Events
from dbcap.exporting import proof
from dbcap.exporting.captioner import CaptionerExport
from dbcap.exporting.publish import whole_folder
from dbcap.exporting.report import ExportReport, File, write_manifest

if TYPE_CHECKING:
    from dbcap.exporting.proof import Proof
    from dbcap.exporting.written import Written
    from dbcap.models.hub import LocalModel

WORTH_A_WARNING = 0.05


def export(config: ExportConfig, common: CommonConfig, events: Events, local: LocalModel, out: Path) -> ExportReport:
    """Write the variants that are asked for, and compare their captions."""
    if config.layout == "optimum" and len(config.variants) > 1:
        raise UsageError("--layout optimum takes one variant", "float32, or one precision with --no-fp32")
    images = proof.check_images(config.check_images) if config.check else []
    if config.check and not images:
        events.say("captions are not compared: name images by --check-images, or install dbcap-starter")
    calibration = proof.images_in(config.calibrate, 1) if config.calibrate and config.int8 else ()
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
        write_manifest(folder, config, local, files, _told(proofs, images))
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
        found = proofs.get(one.variant)
        size = plain.get(_part(one.name))
        facts = {
            "ratio": path.stat().st_size / size if size else None,
            "quantised": one.share.of_all if one.share else None,
            "agreement": found.captions if found else None,
            "latency": found.latency if found else None,
        }
        files.append(File.of(path, one.name, one.variant, **facts))
    return tuple(files)


def _part(name: str) -> str:
    """Return which half of the model a file is."""
    return "encoder" if "encoder_model" in name else "decoder"


def _told(proofs: Mapping[str, Proof], images: Sequence[str]) -> dict[str, object] | None:
    """Return what the manifest says of the check."""
    if not proofs:
        return None
    return {
        "images": len(images),
        "decoding": "the model's own settings; next_tokens, latency and memory greedily, one image at a time",
        "variants": {variant: asdict(one) for variant, one in proofs.items()},
    }
