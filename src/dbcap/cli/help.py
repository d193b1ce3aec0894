"""Help in plain text, 80 columns wide, options under their headings. Rich's boxes leave 30 columns to the words."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

from dbcap.config.models import COMMON


class App(typer.Typer):
    """The app of one command, or of the group of its sub-commands."""

    def __init__(self) -> None:
        super().__init__(add_completion=False, no_args_is_help=True, rich_markup_mode=None)

    def command(self, name: str | None = None) -> Callable[[Any], Any]:  # type: ignore[override]
        """Register a command whose help is laid out here."""
        return super().command(name, cls=_Command)


class _Command(TyperCommand):
    def format_help_text(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - typer's signature
        """Write the text; paragraphs that are indented (examples) keep their lines."""
        formatter.write_paragraph()
        with formatter.indentation():
            paragraphs = inspect.cleandoc(self.help or "").split("\n\n")
            formatter.write_text("\n\n".join(f"\b\n{p}" if p.startswith(" ") else p for p in paragraphs))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the words after the command: square brackets mean that one may be left out, dots that it repeats."""
        return ["[OPTIONS]", *(_argument(param) for param in self.get_params(ctx) if _is_argument(param))]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write each heading and what stands under it, in the order of declaration."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            panels.setdefault(_heading(param), []).append(_row(param, ctx))
        for heading, rows in panels.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


def _heading(param: Any) -> str:
    if param.name == "help":
        return COMMON
    return param.rich_help_panel or ("Arguments" if _is_argument(param) else "Options")


def _row(param: Any, ctx: Any) -> tuple[str, str]:
    """Return names and meaning. `-r, --recursive / --no-recursive` becomes `-r, --[no-]recursive`."""
    if _is_argument(param):
        return _argument(param), param.help or ""
    names, text = param.get_help_record(ctx)
    positive, slash, negative = names.partition(" / ")
    if slash and positive.endswith(negative.replace("--no-", "--")):
        names = positive.replace("--", "--[no-]")
    return names, text


def _is_argument(param: Any) -> bool:
    return bool(param.param_type_name == "argument")


def _argument(param: Any) -> str:
    name = param.metavar if param.required else f"[{param.metavar}]"
    return f"{name}..." if param.nargs == -1 else name
