"""`dbcap doctor`: look over the machine and the installation."""

from __future__ import annotations

import typer

from dbcap.cli.command import Session, plain
from dbcap.cli.config import Json
from dbcap.cli.help import App
from dbcap.cli.output import print_json, print_table
from dbcap.config import paths
from dbcap.errors import FAILED

app = App()


@app.command()
@plain
def doctor(session: Session, as_json: Json = False) -> None:
    """Look over versions, device, folders and the hub. Exit code 1 when dbcap cannot work like this."""
    from dbcap.models.doctor import examine

    home = {"config": paths.config_file().parent, "data": paths.data_dir(), "cache": paths.cache_dir()}
    report = examine(offline=session.common.offline, home=home)
    if as_json:
        print_json(report.as_dict())
    else:
        for section in report.sections:
            rows = [(section.title, row.label, row.text.replace("\n", "; ")) for row in section.rows]
            print_table("", ("", "", ""), rows)
    for problem in report.problems:
        session.events.warn(problem)
    if report.broken:
        raise typer.Exit(FAILED)
