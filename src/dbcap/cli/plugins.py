"""`dbcap plugins`: what is installed, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import typer

from dbcap.cli.command import Session, plain
from dbcap.cli.config import Json
from dbcap.cli.help import App
from dbcap.cli.output import print_json, print_table
from dbcap.errors import FAILED
from dbcap.plugins import loader
from dbcap.plugins.loader import LoadReport

app = App()


def _reports(deep: bool) -> list[LoadReport]:
    from dbcap.cli.app import COMMANDS

    loader.commands(COMMANDS)  # tells the loader which names are taken
    return loader.reports(deep)


def _print(reports: Sequence[LoadReport], as_json: bool) -> None:
    if as_json:
        print_json([{**asdict(r), "slow": r.slow} for r in reports])
        return
    rows = [(r.name, r.group, f"{r.distribution} {r.version}".strip(), _state(r), r.error) for r in reports]
    print_table("Plugins", ("name", "group", "package", "status", ""), rows)


def _state(report: LoadReport) -> str:
    if report.slow:
        return f"{report.status} (slow)"
    return report.status if report.status != "ok" or report.seconds else "not loaded"


@app.command("list")
@plain
def list_(session: Session, as_json: Json = False) -> None:
    """List the installed plugins, without loading any."""
    reports = _reports(deep=False)
    if not reports:
        session.events.say("no plugins are installed")
    _print(reports, as_json)


@app.command()
@plain
def doctor(session: Session, as_json: Json = False) -> None:
    """Load every plugin, call its hooks and name what is wrong. Exit code 1 when something is."""
    reports = _reports(deep=True)
    _print(reports, as_json)
    broken = [r for r in reports if r.status not in ("ok", "disabled")]
    for report in reports:
        if report.slow:
            session.events.warn(f"{report.name} of {report.distribution} takes {report.seconds:.1f} s to load")
    for report in broken:
        session.events.fail(f"{report.name} of {report.distribution}: {report.error}")
    if broken:
        raise typer.Exit(FAILED)
    session.events.say(f"{len(reports)} looked at, nothing is wrong")
