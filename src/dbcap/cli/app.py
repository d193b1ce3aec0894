"""The registration list. A command's module is imported only when the command is typed; plugins come the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from dbcap.cli import signals
from dbcap.errors import OK, DbcapError, UsageError, did_you_mean


@dataclass(frozen=True)
class Command:
    """A line of the list: `module` holds `app`, a typer.Typer."""

    module: str
    help: str


COMMANDS: dict[str, Command] = {
    "caption": Command("dbcap.cli.caption", "Caption images."),
    "prep": Command("dbcap.cli.prep", "Prepare photos of a subject for training."),
    "train": Command("dbcap.cli.train", "Train a personal model from a few photos."),
    "resume": Command("dbcap.cli.resume", "Go on with a run that was interrupted."),
    "generate": Command("dbcap.cli.generate", "Make images from prompts."),
    "export": Command("dbcap.cli.export", "Export models to the formats that other tools read."),
    "runs": Command("dbcap.cli.runs", "List, look into, plot and remove runs."),
    "models": Command("dbcap.cli.models", "List, fetch and look into models."),
    "config": Command("dbcap.cli.config", "Show and change settings, and say where each comes from."),
    "profile": Command("dbcap.cli.profile", "Keep named sets of settings."),
    "cache": Command("dbcap.cli.cache", "Look into and clear what dbcap can make again."),
    "plugins": Command("dbcap.cli.plugins", "List plugins and find out what is wrong with them."),
    "doctor": Command("dbcap.cli.doctor", "Look over versions, device, folders and the hub."),
}


class LazyGroup(TyperGroup):
    """Knows every command's name and help line, and loads only the one that is typed."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - typer's signature, as below
        return [*COMMANDS, *_plugin_commands()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        """Return a stand-in, enough for a listing and for completion of names."""
        if cmd_name in COMMANDS:
            return TyperCommand(cmd_name, help=COMMANDS[cmd_name].help)
        if entry := _plugin_commands().get(cmd_name):
            return TyperCommand(cmd_name, help=f"(plugin {entry.distribution})")
        return None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        try:
            if name in COMMANDS:
                app = import_module(COMMANDS[name].module).app
            elif entry := _plugin_commands().get(name):
                app = entry.load()
            else:
                near = did_you_mean(name, self.list_commands(ctx))
                raise UsageError(f"there is no command {name}", near or "`dbcap --help` lists them")
        except DbcapError:
            if ctx.resilient_parsing:  # the shell asks for completions: none
                return None, None, []
            raise
        command: Any = typer.main.get_command(app)
        command.name = name
        if name in COMMANDS and not command.help:
            command.help = COMMANDS[name].help
        return name, command, args[1:]

    def invoke(self, ctx: Any) -> None:
        """Run the command. What it returns is dropped: an exit code is raised as typer.Exit."""
        try:
            super().invoke(ctx)
        except Exception as error:
            from dbcap.cli.errors import is_fault, name_of

            entry = _plugin_commands().get(ctx.invoked_subcommand)
            if entry is None or not is_fault(error):
                raise
            where = f"the plugin command {entry.name} of {entry.distribution}"
            raise DbcapError(f"{where} failed: {name_of(error)}", "DBCAP_DEBUG=1 shows where") from error


def _plugin_commands() -> dict[str, Any]:
    from dbcap.plugins import loader

    return loader.commands(COMMANDS)


def _version(value: bool) -> None:
    if value:
        from dbcap import __version__

        typer.echo(f"dbcap {__version__}")
        raise typer.Exit


# Help is plain text (see cli/help.py), which also spares `dbcap --help` the import of rich.
app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_version, is_eager=True),
) -> None:
    """One command for the whole loop of personal image models."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line. Returns the exit code; every error that a user can cause is one line on stderr."""
    signals.take()
    try:
        return int(app(list(arguments), prog_name="dbcap", standalone_mode=False) or OK)
    except BaseException as error:  # noqa: BLE001 - the last stop: `explain` raises what it has no line for
        from dbcap.cli.errors import explain
        from dbcap.cli.output import Terminal

        return explain(error, Terminal())
