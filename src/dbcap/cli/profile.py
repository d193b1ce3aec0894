"""`dbcap profile`: named sets of settings."""

from __future__ import annotations

from typing import Annotated

import typer

from dbcap.cli import complete
from dbcap.cli.command import Session, mending, plain
from dbcap.cli.config import Json, text_of
from dbcap.cli.help import App
from dbcap.cli.output import print_json, print_lines, print_table
from dbcap.config import profiles, store
from dbcap.config.layers import normal_key
from dbcap.config.resolve import active_profile
from dbcap.errors import UsageError

app = App()

_NAME = typer.Argument(metavar="NAME", help="Name of the profile.", show_default=False, autocompletion=complete.profile)
Name = Annotated[str, _NAME]


@app.command("list")
@plain
def list_(session: Session, as_json: Json = False) -> None:  # noqa: ARG001
    """List the profiles, and which one is active."""
    active = active_profile()
    rows = [
        {
            "name": name,
            "active": name == active,
            "path": None if name in profiles.BUILTIN else str(profiles.profile_path(name)),
        }
        for name in profiles.names()
    ]
    if as_json:
        print_json(rows)
        return
    lines = [(str(r["name"]), "active" if r["active"] else "", str(r["path"] or "comes with dbcap")) for r in rows]
    print_table("Profiles", ("name", "", "file"), lines)


@app.command()
@plain
def show(session: Session, name: Name, as_json: Json = False) -> None:  # noqa: ARG001
    """Print the settings of a profile."""
    values = profiles.load(name, "named").values
    if as_json:
        print_json(values)
    else:
        print_lines([f"{key} = {text_of(value)}" for key, value in values.items()])


@app.command()
@plain
def create(
    session: Session,
    name: Name,
    values: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Its settings.", show_default=False)
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="NAME",
            help="Begin with the settings of this profile.",
            show_default=False,
            autocompletion=complete.profile,
        ),
    ] = None,
) -> None:
    """Write a new profile."""
    pairs = {}
    for text in values or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"{text!r} is not of the form KEY=VALUE", "for example caption.num_beams=4")
        pairs[normal_key(key)] = value
    path = store.create_profile(name, pairs, base)
    session.events.say(f"profile {name}: {path}")


@app.command()
@mending
def use(
    session: Session,
    name: Annotated[str | None, _NAME] = None,
    none: Annotated[bool, typer.Option("--none", help="Make no profile active.", show_default=False)] = False,
) -> None:
    """Make a profile active for every command that names none."""
    if (name is None) != none:
        raise UsageError("name a profile, or say --none")
    store.use_profile(name)
    session.events.say(f"the active profile is {name}" if name else "no profile is active")


@app.command()
@mending
def delete(session: Session, name: Name) -> None:
    """Delete a profile."""
    store.delete_profile(name)
    session.events.say(f"profile {name} is deleted")
