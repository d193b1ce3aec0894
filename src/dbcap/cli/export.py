"""`dbcap export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dbcap.cli.command import command
from dbcap.cli.help import App
from dbcap.cli.output import print_lines, stderr_console
from dbcap.config.models import CommonConfig, ExportConfig
from dbcap.files import in_units

if TYPE_CHECKING:
    from dbcap.events import Events
    from dbcap.exporting.run import ExportReport

app = App()


@app.command()
@command(ExportConfig, values={"captioner": "caption.model"})
def export(config: ExportConfig, common: CommonConfig, events: Events, captioner: str) -> ExportReport:
    """Export models to the formats that other tools read.

    Prints the folder. A captioner becomes ONNX graphs that dbcap, transformers.js and Optimum run. The table shows
    each file's size (ratio: to float32), the share of its weights that was quantised, the share of captions that agree
    with float32, and milliseconds an image. Examples:

      dbcap export --onnx --int8
      dbcap export starter --int8 --int4 --check-images photos --max-drop 0.03 --out small
    """
    from dbcap.exporting.run import run

    report = run(config, common, events, captioner)
    if not common.quiet:
        _show(report)
    print_lines([str(report.output)])
    return report


def _show(report: ExportReport) -> None:
    """Show the files that were written as a table on stderr."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="bold")
    table.add_column("file", no_wrap=True)
    for column in ("size", "ratio", "quant.", "agree", "ms"):
        table.add_column(column, justify="right")
    for one in report.files:
        table.add_row(
            Path(one.name).name,
            in_units(one.size),
            _share(one.ratio),
            _share(one.quantised),
            _share(one.agreement),
            "" if one.latency is None else f"{1000 * one.latency:.0f}",
        )
    stderr_console().print(table)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
