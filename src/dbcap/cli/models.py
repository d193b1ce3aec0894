"""`dbcap models`: what is here, fetch one, look into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dbcap.cli.command import Session, plain
from dbcap.cli.config import Json
from dbcap.cli.help import App
from dbcap.cli.output import print_json, print_lines, print_table
from dbcap.config.paths import cache_dir
from dbcap.files import in_units
from dbcap.plugins import loader

if TYPE_CHECKING:
    from dbcap.models.reports import ModelReport

app = App()

Spec = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="starter, run:NAME[@STEP], org/name[@revision] on the hub, a folder, or a .safetensors file.",
        show_default=False,
    ),
]


Kind = Annotated[
    Literal["captioner", "diffusion"] | None,
    typer.Option("--kind", help="What it shall be; left out, what it is, of two the captioner.", show_default=False),
]


@app.command("list")
@plain
def list_(session: Session, as_json: Json = False) -> None:
    """List the models of plugins and those in the hub's cache."""
    from dbcap.models import reports

    rows: list[dict[str, Any]] = [
        {
            "model": m.name,
            "kind": m.kind,
            "revision": "",
            "bytes": None,
            "where": "plugin",
            "licence": m.licence,
            "note": m.description,
        }
        for m in loader.models()
    ]
    for cached in reports.cached_models():
        torn = cached.kind != "unknown" and not cached.complete
        note = "incomplete: `dbcap models pull` completes it" if torn else ", ".join(cached.refs)
        rows.append(
            {
                "model": cached.repo,
                "kind": cached.kind,
                "revision": cached.revision,
                "bytes": cached.size,
                "where": "hub cache",
                "licence": "",
                "note": note,
            }
        )
    if as_json:
        print_json(rows)
        return
    if not rows:
        session.events.say("no models are here; `dbcap models pull ORG/NAME` fetches one")
    lines = [
        (r["model"], r["kind"], r["revision"][:12], in_units(r["bytes"]) if r["bytes"] else "", r["where"], r["note"])
        for r in rows
    ]
    print_table("Models", ("model", "kind", "revision", "size", "where", ""), lines)


@app.command()
@plain
def pull(session: Session, spec: Spec, kind: Kind = None) -> None:
    """Fetch what the loader reads of a model, and print the folder."""
    from dbcap.models import hub

    local = hub.locate(
        spec,
        kind=kind,
        offline=session.common.offline,
        allow_pickle=session.common.allow_pickle,
        events=session.events,
        home=cache_dir(),
    )
    session.events.say(f"{spec} is ready, at revision {local.revision[:12]}")
    _say_others(session, spec, kind)
    print_lines([str(local.folder)])


@app.command()
@plain
def show(session: Session, spec: Spec, kind: Kind = None, as_json: Json = False) -> None:
    """Show a model's files, sizes, hashes, licence and kind. Its weights are not fetched."""
    from dbcap.models import reports

    report = reports.inspect(spec, kind=kind, offline=session.common.offline, events=session.events, home=cache_dir())
    _say_others(session, spec, kind)
    if as_json:
        print_json(_as_dict(report))
        return
    facts = {key: value for key, value in _as_dict(report).items() if key != "files" and value not in ("", None)}
    print_table(spec, ("", ""), [(key, _words(value)) for key, value in facts.items()])
    print_table("Files", ("file", "size", "sha256"), [(f.name, in_units(f.size), f.sha256 or "") for f in report.files])


def _say_others(session: Session, spec: str, kind: str | None) -> None:
    """Say that a name has another model too, where none was asked for."""
    from dbcap.models import hub

    for other in hub.kinds(spec)[1:] if kind is None else ():
        session.events.say(f"{spec} is also the name of another model: --kind {other}")


def _words(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _as_dict(report: ModelReport) -> dict[str, Any]:
    return {
        "model": report.spec.text,
        "kind": report.kind,
        "model_type": report.model_type,
        "revision": report.revision,
        "licence": report.licence,
        "description": report.description,
        "size": in_units(report.size),
        "bytes": report.size,
        "pickled": report.pickled,
        "cached": report.cached,
        "folder": str(report.folder) if report.folder else None,
        "problem": report.problem,
        "files": [{"name": f.name, "bytes": f.size, "sha256": f.sha256} for f in report.files],
    }
