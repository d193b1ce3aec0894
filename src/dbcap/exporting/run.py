"""The whole way of `dbcap export`: locate > load > write > prove > publish > report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dbcap.config.exporting import FILES, OF_CAPTIONERS
from dbcap.config.fields import flag_of
from dbcap.config.models import CommonConfig, ExportConfig
from dbcap.config.paths import cache_dir
from dbcap.errors import SIGINT, Interrupted, ModelError, UsageError
from dbcap.events import Events
from dbcap.exporting import publish, report
from dbcap.exporting.report import ExportReport, File
from dbcap.files import sha256_of
from dbcap.inputs import shown
from dbcap.models import hub
from dbcap.models.layout import PIPELINE
from dbcap.models.specs import FINAL, ModelSpec
from dbcap.models.trained import Addition

if TYPE_CHECKING:
    from dbcap.exporting.written import Written
    from dbcap.models.hub import LocalModel

KINDS = {"onnx": None, "torch_bnb4": "captioner", "torch_bnb8": "captioner"}
"""Format -> what it takes (see `hub.locate`), where that is no diffusion model."""


def run(
    config: ExportConfig,
    common: CommonConfig,
    events: Events,
    captioner: str,
    diffusion: str = "",
    given: Mapping[str, Any] = MappingProxyType({}),
) -> ExportReport:
    """Export a model as `dbcap export` does. Raises DbcapError.

    `captioner` or `diffusion` is taken where none is named; `given` are the settings of this very run.
    """
    kind = KINDS.get(config.format, "diffusion")
    text = config.models[0] if config.models else diffusion if kind == "diffusion" else captioner
    if "calibrate" in given and config.calibrate and not config.int8:
        raise UsageError("--calibrate needs --int8")
    if "base" in given and config.format == "lora":
        raise UsageError("--base is for a whole model in one file, and not for --lora", "leave out --base")
    name = _name_of(hub.parsed(text))
    out = Path(config.out) if config.out else Path(f"{name}-export")
    if config.format in FILES:
        out = publish.file_for(str(out), name)
        publish.refuse_file(out, config.force)
    else:
        publish.refuse(out, config.force)
    try:
        if config.format == "lora":
            return _lora(config, common, events, text, out, given)
        local = _located(text, kind, config, common, events)
        _refuse_source(out, local.single.path if local.single else local.folder)
        return _export(config, common, events, local, out, given)
    except (KeyboardInterrupt, Interrupted) as error:
        code = error.exit_code if isinstance(error, Interrupted) else SIGINT
        raise Interrupted(code, f"nothing was written to {shown(str(out))}") from None


def _name_of(spec: ModelSpec) -> str:
    """Return what an export is called: org/name@main -> name, run:dog@80 -> dog-80, a/b.safetensors -> b."""
    if spec.path:
        return Path(os.path.abspath(spec.path)).name.removesuffix(publish.ENDING)
    if spec.kind == "run" and spec.revision != FINAL:
        return f"{spec.name}-{spec.revision}"
    return spec.repo.rpartition("/")[2] or spec.name


def _located(text: str, kind: str | None, config: ExportConfig, common: CommonConfig, events: Events) -> LocalModel:
    return hub.locate(
        text,
        kind=kind,
        base=config.base,
        offline=common.offline,
        allow_pickle=common.allow_pickle,
        events=events,
        home=cache_dir(),
    )


def _export(
    config: ExportConfig,
    common: CommonConfig,
    events: Events,
    local: LocalModel,
    out: Path,
    given: Mapping[str, Any],
) -> ExportReport:
    name = local.spec.text
    if local.onnx:
        raise ModelError(f"{name} is an export already", "export the model that it was made of")
    is_pipeline = local.single is not None or (local.folder / PIPELINE).is_file()
    if config.format == "onnx" and not is_pipeline:
        from dbcap.exporting import captions

        return captions.export(config, common, events, local, out)
    _refuse_given(given, f"{flag_of(config.format)} of {name}" if is_pipeline else flag_of(config.format))
    precision = _precision(config, name) if config.format == "onnx" else ""
    if config.format == "single_file":
        return _single_file(config, local, out)
    with publish.whole_folder(out, config.force) as folder:
        files = _facts(folder, _write(config.format, precision, local, folder))
        report.write_manifest(folder, config, local, files)
    return ExportReport(out, files)


def _refuse_source(out: Path, source: Path) -> None:
    """Raise UsageError where an export would replace what it is made of."""
    if source.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"{shown(str(out))} is or holds what is to be exported", publish.OTHERS)


def _refuse_given(given: Mapping[str, Any], what: str) -> None:
    """Raise UsageError for an option of this run that only ONNX files of captioners have."""
    for name in OF_CAPTIONERS:
        if name in given:
            flag = flag_of(name if given[name] is not False else f"no_{name}")
            raise UsageError(f"{flag} is for ONNX files of captioners, and not for {what}", f"leave out {flag}")


def _write(format_: str, precision: str, local: LocalModel, folder: Path) -> list[Written]:
    """Fill a folder with what is no captioner's ONNX files."""
    if format_ == "diffusers":
        from dbcap.exporting import pipelines

        return pipelines.write_folder(local, folder)
    if format_ == "onnx":
        from dbcap.exporting import diffusion

        return diffusion.write(local, folder, precision)
    from dbcap.exporting import bnb

    return bnb.write(local, folder, 4 if format_ == "torch_bnb4" else 8)


def _precision(config: ExportConfig, name: str) -> str:
    """Return the one precision that a diffusion model is exported in."""
    if len(config.precisions) > 1:
        both = " and ".join(flag_of(one) for one in config.precisions)
        raise UsageError(f"{name} is a diffusion model: a folder has one precision, and not {both}", "choose one")
    if "int4" in config.precisions:
        raise UsageError(f"{name} is a diffusion model, and --int4 is for captioners", "choose --fp16 or --int8")
    return next(iter(config.precisions), "fp32")


def _facts(folder: Path, written: list[Written]) -> tuple[File, ...]:
    return tuple(
        File.of(folder / one.name, one.name, one.variant, quantised=one.share.of_all if one.share else None)
        for one in written
    )


def _single_file(config: ExportConfig, local: LocalModel, out: Path) -> ExportReport:
    from dbcap.exporting import pipelines

    header = report.header(local.spec.text, local.revision)
    with publish.whole_file(out, config.force) as path:
        pipelines.write_file(local, path, config.fp16, header)
        file = File.of(path, out.name, "fp16" if config.fp16 else "")
    return ExportReport(out, (file,))


def _lora(
    config: ExportConfig, common: CommonConfig, events: Events, text: str, out: Path, given: Mapping[str, Any]
) -> ExportReport:
    """Export a LoRA: a file, or what a run made."""
    _refuse_given(given, "--lora")
    spec, unet, source = hub.parsed(text), None, Addition(Path(text), 1.0, "")
    if spec.kind == "file" and spec.path:
        source = Addition(spec.path, 1.0, sha256_of(spec.path))
    elif spec.kind == "run":
        local = _located(text, "diffusion", config, common, events)
        own = [one for one in local.additions if one.own and not one.embedding]
        if not own:
            whole = "--diffusers" if local.additions else "--single-file"
            raise UsageError(f"{text} has no LoRA: it was trained by another --method", f"{whole} writes it whole")
        from dbcap.models import families

        source, unet = own[-1], families.describe(local).unet_config
    else:
        raise UsageError(f"{text} is no LoRA", "give a run of `dbcap train --method lora`, or a .safetensors file")
    from dbcap.exporting import lora

    _refuse_source(out, source.path)
    assert config.lora is not None
    with publish.whole_file(out, config.force) as path:
        lora.convert(source.path, path, config.lora, unet, report.header(text, source.sha256))
        file = File.of(path, out.name, config.lora)
    return ExportReport(out, (file,))
