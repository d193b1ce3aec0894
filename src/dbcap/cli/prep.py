"""`dbcap prep`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dbcap.cli.command import command
from dbcap.cli.help import App
from dbcap.cli.output import Terminal, print_lines
from dbcap.config.models import CommonConfig, PrepConfig

if TYPE_CHECKING:
    from dbcap.dataset.prepare import PrepReport

app = App()


@app.command()
@command(PrepConfig)
def prep(config: PrepConfig, common: CommonConfig, events: Terminal) -> PrepReport:
    """Prepare photos of a subject for training.

    Prints the folder of the data set. Captions come from NAME.txt or NAME.caption beside a photo (lines are joined by
    commas), or its folder's metadata.jsonl; else from --caption or --template. [V] and {class} stand for the words.
    The same command again updates the data set; captions that were edited in it stay. Examples:

      dbcap prep photos --class-word dog --out rex
      dbcap prep photos --class-word toy --crop smart --caption --drop-duplicates --out robot
    """
    from dbcap.dataset.run import run

    report = run(config, common, events)
    _show(report, events)
    print_lines([str(config.out)])
    return report


def _show(report: PrepReport, terminal: Terminal) -> None:
    """Show photos and captions as a table."""
    rows = []
    for one in report.photos:
        photo = one.photo
        size = "{}x{} -> {}x{}".format(*one.size, photo.width, photo.height)
        source = "you" if photo.source == "written" else photo.source
        rows.append((one.name, size, source, photo.caption, "\n".join(one.warnings)))
    terminal.table(("photo", "size", "caption by", "caption", "warnings"), rows)
