"""`dbcap config`: look at settings and change them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Annotated, Any

import typer

from dbcap.cli import complete
from dbcap.cli.command import Session, mending, plain
from dbcap.cli.help import App
from dbcap.cli.output import print_json, print_lines, printable
from dbcap.config import store
from dbcap.config.layers import field_of, from_file, normal_key
from dbcap.config.paths import config_file, project_file
from dbcap.config.resolve import PROFILE_KEY
from dbcap.errors import DbcapError

app = App()

Json = Annotated[bool, typer.Option("--json", help="Print JSON.", show_default=False)]
Project = Annotated[
    bool, typer.Option("--project", help="Use ./dbcap.toml instead of the user's file.", show_default=False)
]
Key = Annotated[
    str,
    typer.Argument(
        metavar="KEY", help="A key such as caption.num_beams.", show_default=False, autocompletion=complete.key
    ),
]


def text_of(value: Any) -> str:
    """Show a value as TOML would; nothing for what is not set."""
    return "" if value is None else json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _file(project: bool) -> Path:
    return project_file() if project else config_file()


@app.command()
@plain
def show(
    session: Session,
    origin: Annotated[
        bool, typer.Option("--origin", help="Say where each value comes from.", show_default=False)
    ] = False,
    as_json: Json = False,
) -> None:
    """Print every key and its value."""
    settings = session.settings
    if as_json:
        entries = {k: {"value": v, "origin": settings.origins[k]} if origin else v for k, v in settings.values.items()}
        print_json(entries)
        return
    lines = [f"{key} = {text_of(value)}".rstrip() for key, value in settings.values.items()]
    width = max(map(len, lines))
    if origin:
        lines = [f"{line:{width}}  # {settings.origins[key]}" for line, key in zip(lines, settings.values, strict=True)]
    print_lines([printable(line) for line in lines])


@app.command()
@plain
def get(session: Session, key: Key) -> None:
    """Print the value of one key."""
    key = normal_key(key)
    field_of(key, "config get")
    value = session.settings.values[key]
    print_lines([value if isinstance(value, str) else text_of(value)])


@app.command("set")
@mending
def set_(
    session: Session,
    key: Key,
    value: Annotated[
        str,
        typer.Argument(metavar="VALUE", help="Its new value.", show_default=False, autocompletion=complete.value),
    ],
    project: Project = False,
) -> None:
    """Write a key to the user's config.toml, or to ./dbcap.toml."""
    key = normal_key(key)
    written = store.set_value(_file(project), key, value)
    session.events.say(f"{key} = {text_of(written)} in {_file(project)}")


@app.command()
@mending
def unset(session: Session, key: Key, project: Project = False) -> None:
    """Take a key out of the user's config.toml, or of ./dbcap.toml."""
    key = normal_key(key)
    found = store.unset_value(_file(project), key)
    session.events.say(f"{key} {'is out of' if found else 'was not in'} {_file(project)}")


@app.command()
@mending
def path(session: Session, project: Project = False) -> None:  # noqa: ARG001 - every command takes the session
    """Print where the settings file is."""
    print_lines([str(_file(project))])


@app.command()
@mending
def edit(session: Session, project: Project = False) -> None:  # noqa: ARG001
    """Open the settings file in $VISUAL or $EDITOR, and check it after."""
    file = _file(project)
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not editor:
        raise DbcapError("neither VISUAL nor EDITOR is set", f"open {file} yourself, or use `dbcap config set`")
    if not file.exists():
        store.write_template(file)
    try:
        code = subprocess.call([*shlex.split(editor), str(file)])
    except OSError as error:
        raise DbcapError(f"cannot start {editor}: {error.strerror}") from error
    if code:
        raise DbcapError(f"{editor} ended with exit code {code}")
    from_file(file, str(file), skip=() if project else (PROFILE_KEY,))
