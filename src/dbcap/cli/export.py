"""`dbcap export`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dbcap.cli.command import command
from dbcap.cli.help import App
from dbcap.cli.output import Terminal, print_lines
from dbcap.config.models import CommonConfig, ExportConfig
from dbcap.files import in_units

if TYPE_CHECKING:
    from dbcap.exporting.report import ExportReport

app = App()


@app.command()
@command(ExportConfig, given="export", values={"captioner": "caption.model", "diffusion": "generate.model"})
def export(
    config: ExportConfig,
    common: CommonConfig,
    events: Terminal,
    given: Mapping[str, Any],
    captioner: str,
    diffusion: str,
) -> ExportReport:
    """Export models to the formats that other tools read.

    Prints the folder or file. Captioners become ONNX graphs that dbcap, transformers.js and Optimum run, or
    checkpoints of bitsandbytes; diffusion models ONNX graphs too, one file that A1111's web UI and ComfyUI read, or a
    folder of diffusers. The table shows each file's size (ratio: to float32), the share of its weights that was
    quantised, the share of captions that agree with float32, and milliseconds an image.
    Formats named here replace those of the settings. `dbcap caption --model FOLDER:q4` takes one of
    the variants fp32, fp16, int8 and q4. Examples:

      dbcap export --onnx --int8
      dbcap export starter --int8 --int4 --check-images photos --max-drop 0.03 --out small
      dbcap export run:my-dog --single-file --fp16 --out my-dog.safetensors
      dbcap export run:my-dog --lora kohya --out loras/
    """
    from dbcap.exporting.run import run

    report = run(config, common, events, captioner, diffusion, given)
    _show(report, events)
    print_lines([str(report.output)])
    return report


def _show(report: ExportReport, terminal: Terminal) -> None:
    """Show the files that were written as a table."""
    columns = {
        "file": [one.name.removeprefix("onnx/") for one in report.files],
        "size": [in_units(one.size) for one in report.files],
        "ratio": [_share(one.ratio) for one in report.files],
        "quant.": [_share(one.quantised) for one in report.files],
        "agree": [_share(one.agreement) for one in report.files],
        "ms": ["" if one.latency is None else f"{1000 * one.latency:.0f}" for one in report.files],
    }
    filled = {name: texts for name, texts in columns.items() if any(texts)}
    terminal.table(list(filled), list(zip(*filled.values(), strict=True)), right=filled.keys() - {"file"})


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
