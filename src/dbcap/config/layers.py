"""The places that settings come from, each read through a pydantic-settings source and checked on its own.

Checking place by place is what lets an error name the file, the key and the allowed values.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from dbcap.config.fields import PREFIX, allowed, choices, cli_of, is_list, is_switch, is_text, variable_of
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
        return _converted(field, raw)
    except ValueError:
        near = did_you_mean(str(raw), choices(field))
        name = "" if where.startswith("--") else f"{key} = "
        shown = json.dumps(raw, ensure_ascii=False, default=str) if not isinstance(raw, str) else repr(raw)
        raise ConfigError(f"{where}: {name}{shown} is not allowed: it must be {allowed(field)}", near) from None


def _converted(field: FieldInfo, raw: Any) -> Any:
    """Return `raw` in the field's type. Raises ValueError (pydantic's is one) where it does not fit."""
    if isinstance(raw, bool) and not is_switch(field):  # pydantic would take `true` for 1
        raise ValueError("on or off")
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    value = TypeAdapter(kind).validate_python(raw)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("not finite")
    return value


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
    if key in SECTIONS:
        raise ConfigError(f"{where}: {key} is a table, not a key", f"name one of its keys, as in {_keys_of(key)[0]}")
    if near := nearest_key(key):
        raise ConfigError(f"{where}: there is no key {key}", f"did you mean {near}?")
    section = key.rpartition(".")[0]
    places = [known.rpartition(".")[2] for known in _keys_of(section)] if section in SECTIONS else []
    places = places or [*CommonConfig.model_fields, *(f"{name}.*" for name in SECTIONS)]
    raise ConfigError(f"{where}: there is no key {key}", "the keys here are " + ", ".join(places))


def _keys_of(section: str) -> list[str]:
    return [key for key in known_fields() if key.rpartition(".")[0] == section]


def nearest_key(key: str) -> str:
    """Return the key that was probably meant: one of the same table, else of a table named nearly so, else of any."""
    section, _, name = key.rpartition(".")
    leaves = {known.rpartition(".")[2]: known for known in reversed(known_fields())}
    own = {known.rpartition(".")[2]: known for known in _keys_of(section)}
    whole = {} if own else dict.fromkeys(known_fields())
    for word, pool in ((name, own), (key, {k: k for k in whole}), (name, leaves)):
        if near := difflib.get_close_matches(word, pool, n=1):
            return pool[near[0]]
    return ""


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
            if value is None:  # YAML's `caption:` with nothing below
                continue
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
    for key in [key for key, raw in values.items() if raw == "" and not is_text(field_of(key, "environment"))]:
        del values[key]  # scripts clear a variable by making it empty
    return Layer("environment", {key: checked(key, raw, variable_of(key)) for key, raw in values.items()})


def _refuse_misspelt_variables() -> None:
    """Refuse what was plainly meant for us. Other `DBCAP_` variables may belong to a plugin."""
    known = {*RESERVED_VARIABLES, *map(variable_of, known_fields())}
    for name in os.environ:
        if name.startswith(PREFIX) and name not in known:
            near = _nearest_variable(name)
            if near is not None:
                hint = f"did you mean {near}?" if near else "docs/config.md lists the names"
                raise ConfigError(f"environment: there is no variable {name}", hint)


def _nearest_variable(name: str) -> str | None:
    """Return the variable that was meant, an empty string for an unknown one of our tables, None for a foreign one."""
    section, nested, leaf = name.removeprefix(PREFIX).lower().partition("__")
    if nested:
        near = nearest_key(f"{section}.{leaf}")
        ours = section in SECTIONS or did_you_mean(section, SECTIONS)
        return (near and variable_of(near)) if ours else None
    if section in SECTIONS:
        return ""
    top = {other.removeprefix(PREFIX).lower(): other for other in RESERVED_VARIABLES}
    top |= {key: variable_of(key) for key in CommonConfig.model_fields}
    if near_top := difflib.get_close_matches(section, top, n=1):
        return top[near_top[0]]
    return next((variable_of(key) for key in known_fields() if key.rpartition(".")[2] == section), None)


def from_file(path: Path, origin: str, skip: tuple[str, ...] = ()) -> Layer:
    """Read a TOML or YAML file but for the keys in `skip`. Raises ConfigError naming the file, and line or key."""
    raw = {key: value for key, value in read_file(path).items() if key not in skip}
    return Layer(origin, {key: checked(key, value, str(path)) for key, value in _flat(raw, str(path))})


def read_file(path: Path) -> Mapping[str, Any]:
    """Parse a configuration file by its ending (.yaml and .yml are YAML, the rest TOML)."""
    import tomllib

    import yaml
    from pydantic_settings import TomlConfigSettingsSource, YamlConfigSettingsSource

    class Toml(TomlConfigSettingsSource):
        def _read_file(self, file_path: Any) -> dict[str, Any]:
            return tomllib.loads(file_path.read_bytes().decode("utf-8-sig"))  # some editors put a BOM before

    try:
        if not path.is_file():
            what = f"{path} is no file" if os.path.lexists(path) else f"there is no configuration file {path}"
            raise ConfigError(what)
        if path.suffix.lower() in (".yaml", ".yml"):
            return YamlConfigSettingsSource(_store(), yaml_file=path).yaml_data
        return Toml(_store(), toml_file=path).toml_data
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid: {' '.join(str(error).split())}") from error
    except (TypeError, ValueError, AttributeError) as error:  # YAML that is a list, a word, or has numbers for keys
        raise ConfigError(f"{path} is not valid: it must hold keys and tables") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
