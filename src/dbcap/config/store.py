"""Writing settings files: comments and order are kept (tomlkit), the file is replaced atomically."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from dbcap.config import profiles
from dbcap.config.layers import checked, field_of
from dbcap.config.paths import config_file
from dbcap.config.resolve import PROFILE_KEY, active_profile
from dbcap.errors import ConfigError, UsageError, did_you_mean
from dbcap.files import write_atomic


def set_value(path: Path, key: str, raw: str) -> Any:
    """Write `key` to a TOML file after checking the value, which is returned."""
    value = checked(key, raw, "config set")
    document = _read(path)
    _put(document, key, value, path)
    _write(path, document)
    return value


def unset_value(path: Path, key: str) -> bool:
    """Take `key` out of a TOML file. Returns whether it stood there."""
    document = _read(path)
    section, _, name = key.rpartition(".")
    table: Any = document.get(section) if section else document
    if isinstance(table, Mapping) and name in table:  # a key that dbcap does not know can be taken out too
        del table[name]  # type: ignore[attr-defined]
        _write(path, document)
        return True
    if key != PROFILE_KEY:
        field_of(key, "config unset")
    return False


def _put(document: tomlkit.TOMLDocument, key: str, value: Any, path: Path) -> None:
    section, _, name = key.rpartition(".")
    if section and section not in document:
        document[section] = tomlkit.table()
    table: Any = document[section] if section else document
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: {section} is a table, not a value", "mend it with `dbcap config edit`")
    table[name] = list(value) if isinstance(value, tuple) else value  # type: ignore[index]


def _read(path: Path) -> tomlkit.TOMLDocument:
    try:
        return (
            tomlkit.parse(path.read_bytes().decode("utf-8-sig")) if path.exists() else tomlkit.document()
        )  # keeps CRLF
    except (TOMLKitError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid: {error}", "mend it with `dbcap config edit`") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _write(path: Path, document: tomlkit.TOMLDocument) -> None:
    data = tomlkit.dumps(document).encode("utf-8", "surrogateescape")  # as typed, where the locale is not UTF-8
    try:
        data.decode()
        write_atomic(path, data)
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot write {path}: a settings file is UTF-8, and this value is not") from error
    except OSError as error:
        reason = f"{path.parent} is no folder" if isinstance(error, FileExistsError) else error.strerror
        raise ConfigError(f"cannot write {path}: {reason}") from error


def use_profile(name: str | None) -> None:
    """Make a profile active for every command that names none; `None` makes none active."""
    if name is None:
        unset_value(config_file(), PROFILE_KEY)
        return
    profiles.load(name, "named")
    document = _read(config_file())
    document[PROFILE_KEY] = name
    _write(config_file(), document)


def create_profile(name: str, values: Mapping[str, str], base: str | None = None) -> Path:
    """Write a new profile, beginning with the values of `base`. Raises UsageError when the name is taken."""
    path = profiles.profile_path(name)
    if name in profiles.names():
        hint = f"change {path}, or " if path.is_file() else ""
        raise UsageError(f"there is a profile {name} already", f"{hint}choose another name")
    document = tomlkit.document()
    document.add(tomlkit.comment(f"Settings of the profile {name}: dbcap ... --profile {name}"))
    start = dict(profiles.load(base, "named").values) if base else {}
    for key, raw in {**start, **values}.items():
        _put(document, key, checked(key, raw, "profile create"), path)
    _write(path, document)
    return path


def delete_profile(name: str) -> None:
    """Delete a profile of the user; an active one is made inactive first."""
    if name in profiles.BUILTIN:
        raise UsageError(f"the profile {name} comes with dbcap and stays")
    path = profiles.profile_path(name)
    if not path.is_file():
        raise ConfigError(f"there is no profile {name}", did_you_mean(name, profiles.names()))
    if active_profile() == name:
        use_profile(None)
    path.unlink()


def write_template(path: Path) -> None:
    """Write a settings file that holds nothing but a line on how to fill it."""
    document = tomlkit.document()
    document.add(
        tomlkit.comment("Settings of dbcap: `dbcap config show` lists the keys, for example [caption] num_beams = 4")
    )
    _write(path, document)
