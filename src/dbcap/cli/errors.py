"""From an exception to one line on stderr and an exit code."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import typer

from dbcap.errors import FAILED, OK, SIGINT, SIGTERM, USAGE, DbcapError, Interrupted

if TYPE_CHECKING:
    from dbcap.cli.output import Terminal

_UsageProblem = typer.BadParameter.__mro__[1]  # typer's own usage error, for which it has no public name


def explain(error: BaseException, terminal: Terminal) -> int:
    """Say what happened in one line and return the exit code. With DBCAP_DEBUG=1 the exception goes on instead."""
    if isinstance(error, typer.Exit | SystemExit):
        return error.exit_code if isinstance(error, typer.Exit) else int(error.code or OK)
    if isinstance(error, BrokenPipeError):
        from dbcap.cli.output import close_stdout

        close_stdout()  # `| head` has what it wanted
        return OK
    if isinstance(error, KeyboardInterrupt | Interrupted | typer.Abort):
        code = error.exit_code if isinstance(error, Interrupted) else SIGINT
        terminal.error("terminated" if code == SIGTERM else "interrupted")
        return code
    if isinstance(error, _UsageProblem):
        terminal.error(_usage_line(error))
        return USAGE
    if os.environ.get("DBCAP_DEBUG") or not isinstance(error, Exception):
        raise error
    if isinstance(error, DbcapError):
        terminal.error(str(error))
        return error.exit_code
    terminal.error(
        f"{type(error).__name__}: {error}; this is a fault in dbcap, and DBCAP_DEBUG=1 shows where it happened"
    )
    return FAILED


def _usage_line(error: Any) -> str:
    message = " ".join(error.format_message().split()).rstrip(".")
    if not error.ctx:
        return message
    if type(error).__name__ == "NoArgsIsHelpError":
        return f"a command is missing; `{error.ctx.command_path} --help` lists them"
    path = error.ctx.command_path
    return f"{path}: {message[:1].lower()}{message[1:]}; `{path} --help` shows what it takes"
