"""One option is one field: what a field knows about its option, its key, its variable and its allowed values."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

PREFIX = "DBCAP_"


class Section(BaseModel):
    """Base of the configuration models: frozen, and no key that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=False)

    alternatives: ClassVar[tuple[str, ...]] = ()
    """Fields that are one choice: a place that sets one of them outdoes what weaker places say of all of them."""


@dataclass(frozen=True)
class Cli:
    """What the command line shows of a field."""

    flags: tuple[str, ...] = ()
    group: str = "Options"
    unset: str = ""  # how help names the default `None`
    metavar: str = ""
    takes: str = ""  # in words, what a `pattern` allows
    argument: bool = False  # positional; cannot be set in a file or the environment
    changeable: bool = False  # of a run's settings: `dbcap resume` may change it


def option(
    default: Any,
    text: str,
    *flags: str,
    group: str = "Options",
    unset: str = "",
    metavar: str = "",
    takes: str = "",
    changeable: bool = False,
    **bounds: Any,
) -> Any:
    """Declare a field that is an option; help shows `text`. `flags` are added to the one derived from its name."""
    cli = Cli(flags=flags, group=group, unset=unset, metavar=metavar, takes=takes, changeable=changeable)
    return Field(default, description=text, json_schema_extra={"cli": cli}, **bounds)  # type: ignore[dict-item]


def argument(metavar: str, text: str, *, required: bool = True) -> Any:
    """Declare a field that is given by position, on the command line only: a tuple, empty if it is not required."""
    extra: Any = {"cli": Cli(metavar=metavar, argument=True)}
    return Field(... if required else (), description=text, json_schema_extra=extra)


def cli_of(field: FieldInfo) -> Cli:
    """Return the command line facts of a field made by `option` or `argument`."""
    extra = field.json_schema_extra
    cli = extra.get("cli") if isinstance(extra, dict) else None
    return cli if isinstance(cli, Cli) else Cli()


def flag_of(name: str) -> str:
    """Return the long option of a field: `num_beams` -> `--num-beams`, and `from_`, a word of Python's -> `--from`."""
    return "--" + name.rstrip("_").replace("_", "-")


def variable_of(key: str) -> str:
    """Return the environment variable of a key: `caption.num_beams` -> `DBCAP_CAPTION__NUM_BEAMS`."""
    return PREFIX + key.replace(".", "__").upper()


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type, without `None` and without their bounds."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(m for part in get_args(annotation) for m in members(part))
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    return () if annotation is type(None) else (annotation,)


def _all_bounds(annotation: Any) -> list[Any]:
    found = [item for part in get_args(annotation) for item in _all_bounds(part)]
    return found + list(getattr(annotation, "__metadata__", ()))


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Return the literal values that a field allows."""
    return tuple(str(v) for m in members(field.annotation) if get_origin(m) is Literal for v in get_args(m))


def is_switch(field: FieldInfo) -> bool:
    """Tell whether the field is on or off."""
    return members(field.annotation) == (bool,)


def is_text(field: FieldInfo) -> bool:
    """Tell whether an empty text is a value like any other."""
    return str in members(field.annotation)


def is_list(field: FieldInfo) -> bool:
    """Tell whether the option may be given several times."""
    return any(get_origin(m) is tuple for m in members(field.annotation))


def metavar_of(field: FieldInfo) -> str:
    """Return the word that help shows for the value."""
    if own := cli_of(field).metavar:
        return own
    kinds = [m for m in members(field.annotation) if get_origin(m) is not Literal]
    if not kinds:
        return "WORD"
    return "|".join([*choices(field), *({int: "N", float: "X"}.get(kind, "TEXT") for kind in kinds)])


def allowed(field: FieldInfo) -> str:
    """Say in words which values a field takes: `auto or an integer of at least 1`."""
    if takes := cli_of(field).takes:
        return takes
    parts = []
    if values := choices(field):
        parts.append(values[0] if len(values) == 1 else "one of " + ", ".join(values))
    for member in members(field.annotation):
        if get_origin(member) is Literal:
            continue
        words = {bool: "true or false", int: "an integer", float: "a number", str: "text"}.get(member, "a list of text")
        parts.append(words + _bounds(field))
    return " or ".join(parts)


def _bounds(field: FieldInfo) -> str:
    words = []
    for item in [*field.metadata, *_all_bounds(field.annotation)]:
        if isinstance(item, annotated_types.Ge):
            words.append(f"of at least {item.ge}")
        elif isinstance(item, annotated_types.Gt):
            words.append(f"above {item.gt}")
        elif isinstance(item, annotated_types.Le):
            words.append(f"of at most {item.le}")
        elif isinstance(item, annotated_types.Lt):
            words.append(f"below {item.lt}")
        elif isinstance(item, AfterValidator):
            words.append("that is not empty")
    return " " + " and ".join(words) if words else ""


def default_text(field: FieldInfo) -> str:
    """Say in words what holds when nothing is set."""
    value = field.default
    if value is None:
        return cli_of(field).unset
    if isinstance(value, bool):
        return "on" if value else ""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value)
