"""From an exception to one line on stderr and an exit code."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import typer

from dbcap.errors import FAILED, OK, SIGHUP, SIGINT, SIGTERM, USAGE, DbcapError, Interrupted, did_you_mean
from dbcap.files import NO_ROOM

if TYPE_CHECKING:
    from dbcap.cli.output import Terminal

_UsageProblem, _Problem = typer.BadParameter.__mro__[1:3]  # typer's own errors, for which it has no public names
_ENDS = {SIGINT: "interrupted", SIGTERM: "terminated", SIGHUP: "the terminal was closed"}


def is_fault(error: Exception) -> bool:
    """Tell whether nobody foresaw this exception: no mistake of the user, no message of the system, no way to end."""
    return not isinstance(error, DbcapError | OSError | typer.Exit | typer.Abort | _Problem)


def explain(error: BaseException, terminal: Terminal) -> int:
    """Say what happened in one line and return the exit code. With DBCAP_DEBUG=1 the exception goes on instead."""
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, SystemExit):
        return _left(error, terminal)
    if isinstance(error, BrokenPipeError):
        return _nobody_reads()
    if isinstance(error, KeyboardInterrupt | Interrupted):
        code, state = (error.exit_code, error.state) if isinstance(error, Interrupted) else (SIGINT, "")
        terminal.error(_ENDS.get(code, "terminated") + (f": {state}" if state else ""))
        return code
    if isinstance(error, _UsageProblem):
        if type(error).__name__ == "NoArgsIsHelpError":
            terminal.help(str(error))
        else:
            terminal.error(_usage_line(error))
        return USAGE
    if os.environ.get("DBCAP_DEBUG", "0") not in ("", "0") or not isinstance(error, Exception):
        raise error
    terminal.error(_line(error))
    return error.exit_code if isinstance(error, DbcapError) else FAILED


def _line(error: Exception) -> str:
    if isinstance(error, typer.Abort):
        return "aborted"
    if isinstance(error, OSError) and error.strerror:
        if not error.filename:
            return error.strerror
        return f"{error.filename}: {error.strerror}" + "; make room there" * (error.errno in NO_ROOM)
    if not is_fault(error):
        return str(error)
    return f"{name_of(error)}; this is a fault in dbcap, and DBCAP_DEBUG=1 shows where it happened"


def name_of(error: Exception) -> str:
    """Return the type and the message, if there is one."""
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _left(error: SystemExit, terminal: Terminal) -> int:
    """Return the code of a `sys.exit()`: typer calls it when a pipe breaks, a plugin with a code or a text."""
    if isinstance(error.__context__, BrokenPipeError):
        return _nobody_reads()
    if error.code is None or isinstance(error.code, int):
        return error.code or OK
    terminal.error(str(error.code))
    return FAILED


def _nobody_reads() -> int:
    """`| head` has what it wanted: let go of stdout, so that the interpreter does not complain on its way out."""
    from dbcap.cli.output import close_stdout

    close_stdout()
    return OK


def _usage_line(error: Any) -> str:
    unknown = type(error).__name__ == "NoSuchOption"
    message = " ".join((error.message if unknown else error.format_message()).split()).rstrip(".")
    message = message[:1].lower() + message[1:]
    if not error.ctx:
        return message
    path, near = error.ctx.command_path, ""
    hint = f"`{path} --help` shows what it takes"
    if unknown:
        near = did_you_mean(
            error.option_name,
            [name for param in error.ctx.command.params for name in (*param.opts, *param.secondary_opts)],
        )
        if error.ctx.parent is None:
            hint = "options come after the command, as in `dbcap caption --quiet`"
    return f"{path}: {message}; {near or hint}"
