"""From a configuration model to a command: its options are derived, its settings resolved, its errors explained."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

import typer
from pydantic.fields import FieldInfo

from dbcap.cli import complete
from dbcap.cli.errors import explain
from dbcap.cli.output import Terminal
from dbcap.config import fields
from dbcap.config.fields import Section
from dbcap.config.models import COMMON, SECTIONS, CommonConfig
from dbcap.config.resolve import Given, Settings, resolve
from dbcap.errors import ConfigError
from dbcap.files import working_folder
from dbcap.plugins import loader

C = TypeVar("C", bound=Section)


class HasOutcome(Protocol):
    """What every command's report can say at the end."""

    @property
    def exit_code(self) -> int: ...
    @property
    def summary(self) -> str: ...


@dataclass(frozen=True)
class Session:
    """One run of one command: all settings, and where to talk."""

    settings: Settings
    common: CommonConfig
    events: Terminal


def command(
    model: type[C], *, given: str = "", values: Mapping[str, str] | None = None
) -> Callable[[Callable[..., HasOutcome]], Callable[..., None]]:
    """Make a command whose options are the fields of `model` and which prints the summary of the report it returns.

    With the name of another table, `given` passes the function what was set of that table for this very run; `values`
    passes keys of other tables as arguments of these names.
    """
    section = next(name for name, known in SECTIONS.items() if known is model)

    def decorate(function: Callable[..., HasOutcome]) -> Callable[..., None]:
        def start(session: Session, **own: Any) -> None:
            working_folder()
            more: dict[str, Any] = {"given": session.settings.given(given)} if given else {}
            more |= {name: session.settings.values[key] for name, key in (values or {}).items()}
            report = function(session.settings.section(model, **own), session.common, session.events, **more)
            if report.summary:
                session.events.say(report.summary)
            if report.exit_code:
                raise typer.Exit(report.exit_code)

        return _build(function, start, options_of(model), section=section)

    return decorate


def plain(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command from a function `(session, own typer parameters...)`; the common options are added."""
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "session"]
    return _build(function, function, own)


def mending(function: Callable[..., None]) -> Callable[..., None]:
    """Make a plain command that runs whatever is wrong with the settings files, since it is there to put them right."""
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "session"]
    return _build(function, function, own, mends=True)


def _build(
    function: Callable[..., Any],
    start: Callable[..., None],
    own: list[inspect.Parameter],
    *,
    section: str = "",
    mends: bool = False,
) -> Callable[..., None]:
    model = SECTIONS.get(section)
    shared = [*options_of(CommonConfig), *_where_to_look()]

    def callback(**typed: Any) -> None:
        terminal = Terminal()
        try:
            given = _given(typed, section)
            settings = _resolve_in_spite(given) if mends else resolve(given)
            common = settings.section(CommonConfig)
            terminal = Terminal.of(common)
            _prepare_process(common)
            try:
                start(Session(settings, common, terminal), **_arguments(typed, own, model))
            finally:
                for problem in loader.problems():
                    terminal.warn(problem)
        except BaseException as error:  # noqa: BLE001 - `explain` raises what it has no line for
            raise typer.Exit(explain(error, terminal)) from None

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *shared)]
    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    callback.__annotations__ = {p.name: p.annotation for p in parameters}
    callback.__name__, callback.__doc__ = function.__name__, function.__doc__
    return callback


def _resolve_in_spite(given: Given) -> Settings:
    try:
        return resolve(given)
    except ConfigError:
        return resolve(given, files=False)


def _prepare_process(common: CommonConfig) -> None:
    """Set what libraries read from the environment when they are imported, which is later."""
    import logging
    import os

    if common.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # diffusers imports it, and it says what it has not
    if "OMP_WAIT_POLICY" not in os.environ:
        # torch's threads wait for each other by spinning for milliseconds. Where something else wants the cores as
        # well, the one that all wait for gets none: captioning beside another program took 3 to 20 times as long.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _given(typed: Mapping[str, Any], section: str) -> Given:
    model = SECTIONS.get(section)
    options: dict[str, Any] = {}
    for known, prefix in ((CommonConfig, ""), (model, f"{section}.")):
        for name, field in known.model_fields.items() if known else ():
            value = typed[name]
            if value not in (None, []) and not fields.cli_of(field).argument:
                options[prefix + name] = value
    return Given(options, typed["assign"] or (), section, typed["config_file"], typed["profile_name"])


def _arguments(typed: Mapping[str, Any], own: list[inspect.Parameter], model: type[Section] | None) -> dict[str, Any]:
    """Return what the function takes itself: positional fields of a model, or all parameters of a plain command."""
    if model is None:
        return {p.name: typed[p.name] for p in own}
    return {name: tuple(typed[name] or ()) for name, f in model.model_fields.items() if fields.cli_of(f).argument}


def options_of(model: type[Section]) -> list[inspect.Parameter]:
    """Derive typer parameters from a model's fields. All default to "not given"; values stay text until resolved."""
    own = [item for item in model.model_fields.items() if item[0] in model.__annotations__]
    inherited = [item for item in model.model_fields.items() if item[0] not in model.__annotations__]
    return [_parameter(name, field) for name, field in (*own, *inherited)]


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    cli = fields.cli_of(field)
    default, choices = fields.default_text(field), fields.choices(field)
    text = (
        str(field.description)
        + (f" One of {', '.join(choices)}." if len(choices) > 1 else "")
        + (f" (default {default})" if default else "")
    )
    if cli.argument:
        info: Any = typer.Argument(metavar=cli.metavar, help=field.description, show_default=False)
        if field.is_required():
            return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[list[str], info])
        optional = Annotated[list[str] | None, info]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=optional)
    flag = fields.flag_of(name)
    switch = fields.is_switch(field)
    long = () if any(f.startswith("--") for f in cli.flags) else (f"{flag}/--no-{flag[2:]}" if switch else flag,)
    info = typer.Option(
        *long,
        *cli.flags,
        help=text,
        metavar="" if switch else fields.metavar_of(field),
        rich_help_panel=cli.group,
        show_default=False,
        autocompletion=complete.one_of(choices) if choices else None,
    )
    kind: Any = bool | None if switch else (list[str] if fields.is_list(field) else str | None)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, info])


def _where_to_look() -> list[inspect.Parameter]:
    """Return the options that choose places of settings; they are no settings themselves."""

    def make(name: str, kind: Any, flag: str, metavar: str, text: str, completer: Any = None) -> inspect.Parameter:
        info = typer.Option(
            flag, metavar=metavar, help=text, rich_help_panel=COMMON, show_default=False, autocompletion=completer
        )
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, info])

    return [
        make("profile_name", str | None, "--profile", "NAME", "Use the settings of this profile.", complete.profile),
        make("config_file", str | None, "--config", "FILE", "Use the settings of this TOML or YAML file."),
        make(
            "assign", list[str], "--set", "KEY=VALUE", "Set any key for this run; may be repeated.", complete.assignment
        ),
    ]
