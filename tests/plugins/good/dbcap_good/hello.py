"""The command `dbcap hello`."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command()
def hello(name: Annotated[str, typer.Argument(help="Whom to greet.")] = "world") -> None:
    """Greet somebody."""
    typer.echo(f"hello {name}")
