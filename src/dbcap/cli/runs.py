"""`dbcap runs`: what was trained here, and what came of it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dbcap import run_reports, runs
from dbcap.cli import complete
from dbcap.cli.command import Session, plain
from dbcap.cli.config import Json
from dbcap.cli.help import App
from dbcap.cli.output import print_json, print_lines, print_table
from dbcap.errors import LockHeldError, UsageError
from dbcap.files import in_units

app = App()

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the run.", show_default=False, autocompletion=complete.run)
]


@app.command("list")
@plain
def list_(session: Session, as_json: Json = False) -> None:
    """List the runs, the one that was changed last first."""
    found = run_reports.overview()
    if as_json:
        print_json([vars(run) for run in found])
        return
    if not found:
        session.events.say("there are no runs; `dbcap train` makes one")
    lines = [
        (
            run.name,
            f"{run.status} ({run.note})" if run.note else run.status,
            f"{run.step}/{run.steps}",
            run.method,
            run.model,
            run_reports.when(run.changed),
            in_units(run.size),
        )
        for run in found
    ]
    print_table("Runs", ("run", "status", "steps", "method", "model", "changed", "size"), lines)


@app.command()
@plain
def show(session: Session, name: Name, as_json: Json = False) -> None:
    """Show all that is known about a run: its state, checkpoints and settings."""
    found = run_reports.details(runs.find(name))
    if as_json:
        print_json(found)
        return
    print_table(name, ("", ""), _facts(found))
    rows = [(str(c["step"]), in_units(c["bytes"]), "best" if c["best"] else "") for c in found["checkpoints"]]
    if rows:
        print_table("Checkpoints", ("step", "size", ""), rows)
    settings = [
        (key, str(value)) for key, value in (found.get("config") or {}).items() if value not in (None, (), [], "")
    ]
    print_table("Settings", ("setting", "value"), settings)
    session.events.say(f"next: {found['next']}")


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of a run's own table; what is not known has none."""
    base, best = found.get("base") or {}, found.get("best") or {}
    values = {
        "status": f"{found['status']} ({found['note']})" if found["note"] else found["status"],
        "message": found.get("message"),
        "step": f"{found['step']} of {found.get('steps', '?')}",
        "method": found.get("method"),
        "model": base.get("model"),
        "revision": base.get("revision"),
        "identifier": found.get("identifier"),
        "class": found.get("class"),
        "best": f"{best['value']:.6g} at step {best['step']}" if best else "",
        **{f"last {key.replace('_', ' ')}": f"{value:.6g}" for key, value in found["last"].items()},
        "created": run_reports.when(found.get("created", "")),
        "changed": run_reports.when(found.get("changed", "")),
        "final": found["final"],
        "folder": found["folder"],
        "size": in_units(found["bytes"]),
    }
    return [(key, str(value)) for key, value in values.items() if value]


@app.command()
@plain
def path(
    session: Session,  # noqa: ARG001 - every command takes the session
    name: Name,
    final: Annotated[bool, typer.Option("--final", help="Of the finished model.", show_default=False)] = False,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            metavar="STEP|last|best",
            help="Of a checkpoint.",
            show_default=False,
            autocompletion=complete.one_of((runs.LAST, runs.BEST)),
        ),
    ] = None,
) -> None:
    """Print where a run is."""
    if final and checkpoint is not None:
        raise UsageError("--final and --checkpoint exclude each other")
    run = runs.find(name)
    place = run.checkpoint(checkpoint) if checkpoint is not None else run.result() if final else run.folder
    print_lines([str(place)])


@app.command()
@plain
def rm(
    session: Session,
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME", help="Names of runs.", show_default=False, autocompletion=complete.run),
    ],
) -> None:
    """Remove runs with all their checkpoints. Data sets and class images stay."""
    chosen = [runs.find(name) for name in dict.fromkeys(names)]
    for run in chosen:  # all or none
        if run.is_locked():
            raise LockHeldError(f"the run {run.name} is being trained", "stop that first, with Ctrl-C")
    for run in chosen:
        session.events.say(f"the run {run.name} is removed, {in_units(runs.remove(run))}")


@app.command()
@plain
def plot(
    session: Session,  # noqa: ARG001
    name: Name,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write this PNG (default NAME.png).", show_default=False),
    ] = None,
) -> None:
    """Draw a run's losses and sample pictures into a PNG, and print its path."""
    print_lines([str(run_reports.plot(runs.find(name), output))])
