"""The places that settings come from, each read through a pydantic-settings source and checked on its own.

Checking place by place is what lets an error name the file, the key and the allowed values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from dbcap.config.fields import PREFIX, allowed, choices, cli_of, is_list, variable_of
from dbcap.config.models import SECTIONS, CommonConfig
from dbcap.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from pydantic_settings import BaseSettings

RESERVED_VARIABLES = ("DBCAP_HOME", "DBCAP_PROFILE", "DBCAP_PLUGINS", "DBCAP_DEBUG")


@cache
def known_fields() -> dict[str, FieldInfo]:
    """Return every key that a file may hold -> its field."""
    fields = dict(CommonConfig.model_fields)
    for section, model in SECTIONS.items():
        fields |= {f"{section}.{name}": f for name, f in model.model_fields.items() if not cli_of(f).argument}
    return fields


@dataclass(frozen=True)
class Layer:
    """One place: `origin` is what `config show --origin` and errors call it, `values` are checked."""

    origin: str
    values: Mapping[str, Any]


def checked(key: str, raw: Any, where: str) -> Any:
    """Return `raw` as the value of `key`. Raises ConfigError naming `where`, the key and what is allowed."""
    field = field_of(key, where)
    if is_list(field) and isinstance(raw, str):
        raw = _as_list(raw)
    try:
        kind = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        return TypeAdapter(kind).validate_python(raw)
    except ValidationError:
        near = did_you_mean(str(raw), choices(field))
        name = "" if where.startswith("--") else f"{key} = "
        shown = json.dumps(raw, ensure_ascii=False, default=str) if not isinstance(raw, str) else repr(raw)
        raise ConfigError(f"{where}: {name}{shown} is not allowed: it must be {allowed(field)}", near) from None


def field_of(key: str, where: str) -> FieldInfo:
    """Return the field of a key. Raises ConfigError with the nearest key, or all keys of that table."""
    fields = known_fields()
    if key in fields:
        return fields[key]
    if key == "profile":
        raise ConfigError(
            f"{where}: there is no key profile",
            "a profile is chosen by --profile, DBCAP_PROFILE or `dbcap profile use`",
        )
    section, _, name = key.rpartition(".")
    siblings = [k for k in fields if k.rpartition(".")[0] == section]
    if near := did_you_mean(key, fields) or did_you_mean(name, [k.rpartition(".")[2] for k in siblings]):
        raise ConfigError(f"{where}: there is no key {key}", near)
    places = siblings or [*CommonConfig.model_fields, *(f"{s}.*" for s in SECTIONS)]
    raise ConfigError(f"{where}: there is no key {key}", "the keys here are " + ", ".join(places))


def _as_list(text: str) -> list[Any]:
    """Read a JSON list, or take the text as the one item."""
    if text.lstrip().startswith("["):
        try:
            value = json.loads(text)
        except ValueError:
            return [text]
        if isinstance(value, list):
            return value
    return [text]


def normal_key(key: str) -> str:
    """Accept `caption.num-beams` where people type keys."""
    return key.strip().replace("-", "_")


@cache
def _store() -> type[BaseSettings]:
    """Return one settings class with every key, for the pydantic-settings sources to read by."""
    from pydantic import create_model
    from pydantic_settings import BaseSettings, SettingsConfigDict

    class Base(BaseSettings):
        model_config = SettingsConfigDict(
            env_prefix=PREFIX, env_nested_delimiter="__", extra="allow", enable_decoding=False
        )

    fields: dict[str, Any] = {name: (f.annotation, f) for name, f in CommonConfig.model_fields.items()}
    fields |= {name: (model, None) for name, model in SECTIONS.items()}
    return create_model("Store", __base__=Base, **fields)


def _flat(values: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if key in SECTIONS:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: {key} is a table, not a value", f"write [{key}] above its keys")
            yield from ((f"{key}.{name}", item) for name, item in value.items())
        elif isinstance(value, Mapping):
            near = did_you_mean(key, SECTIONS)
            raise ConfigError(f"{where}: there is no table [{key}]", near or "the tables are " + ", ".join(SECTIONS))
        else:
            yield key, value


def from_environment() -> Layer:
    """Read `DBCAP_KEY` and `DBCAP_TABLE__KEY`."""
    from pydantic_settings import EnvSettingsSource

    _refuse_misspelt_variables()
    values = {key: raw for key, raw in _flat(EnvSettingsSource(_store())(), "environment") if raw is not None}
    return Layer("environment", {key: checked(key, raw, variable_of(key)) for key, raw in values.items()})


def _refuse_misspelt_variables() -> None:
    """A section's variables are checked by the source; a top-level one that is nearly a known one is a slip too."""
    known = {*RESERVED_VARIABLES, *(variable_of(key) for key in known_fields())}
    for name in os.environ:
        if not name.startswith(PREFIX) or name in known:
            continue
        section, nested, _ = name.removeprefix(PREFIX).partition("__")
        near = did_you_mean(name, known)
        if near or (nested and section.lower() in SECTIONS):
            raise ConfigError(f"environment: there is no variable {name}", near or "see docs/config.md for the names")


def from_file(path: Path, origin: str, skip: tuple[str, ...] = ()) -> Layer:
    """Read a TOML or YAML file but for the keys in `skip`. Raises ConfigError naming the file, and line or key."""
    raw = {key: value for key, value in read_file(path).items() if key not in skip}
    return Layer(origin, {key: checked(key, value, str(path)) for key, value in _flat(raw, str(path))})


def read_file(path: Path) -> Mapping[str, Any]:
    """Parse a configuration file by its ending (.yaml and .yml are YAML, the rest TOML)."""
    import tomllib

    import yaml
    from pydantic_settings import TomlConfigSettingsSource, YamlConfigSettingsSource

    try:
        if not path.is_file():
            raise ConfigError(f"there is no configuration file {path}")
        if path.suffix.lower() in (".yaml", ".yml"):
            return YamlConfigSettingsSource(_store(), yaml_file=path).yaml_data
        return TomlConfigSettingsSource(_store(), toml_file=path).toml_data
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not valid: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
