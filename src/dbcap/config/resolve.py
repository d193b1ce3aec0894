"""Who wins: command line > environment > --config > named profile > project > active profile > user file > defaults."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from dbcap.config import profiles
from dbcap.config.fields import flag_of, variable_of
from dbcap.config.layers import Layer, checked, from_environment, from_file, known_fields, normal_key, read_file
from dbcap.config.models import SECTIONS
from dbcap.config.paths import config_file, project_file
from dbcap.errors import ConfigError, UsageError

COMMAND_LINE = "command line"
DEFAULT = "default"
PROFILE_KEY = "profile"  # in the user's config.toml: the profile made active
M = TypeVar("M")


@dataclass(frozen=True)
class Given:
    """What stands on the command line: options by key, and where else to look."""

    options: Mapping[str, Any] = field(default_factory=dict)
    assignments: Sequence[str] = ()  # --set KEY=VALUE
    section: str = ""  # the command's table, so that --set num_beams=4 needs no `caption.`
    config: str | None = None
    profile: str | None = None


@dataclass(frozen=True)
class Settings:
    """Every key with its value and the place that it comes from."""

    values: Mapping[str, Any]
    origins: Mapping[str, str]

    def section(self, model: type[M], **arguments: Any) -> M:
        """Build the frozen model of a command. Raises ConfigError when its values exclude each other."""
        prefix = next((f"{name}." for name, known in SECTIONS.items() if known is model), "")
        known = {name: self.values[prefix + name] for name in model.model_fields if prefix + name in self.values}  # type: ignore[attr-defined]
        try:
            return model(**known, **arguments)
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ConfigError(message, self._elsewhere(prefix, message)) from None

    def given(self, section: str) -> dict[str, Any]:
        """Return what was set of a table for this very run: on the command line, or in the file of --config."""
        prefix, places = f"{section}.", (COMMAND_LINE, "--config ")
        return {
            key.removeprefix(prefix): value
            for key, value in self.values.items()
            if key.startswith(prefix) and self.origins[key].startswith(places)
        }

    def _elsewhere(self, prefix: str, message: str) -> str:
        """Name the place of each option in a message that was not typed just now."""
        keys = [prefix + flag[2:].replace("-", "_") for flag in re.findall(r"--[a-z][a-z-]*", message)]
        places = [
            f"{k} comes from {self.origins[k]}"
            for k in keys
            if self.origins.get(k) not in (None, COMMAND_LINE, DEFAULT)
        ]
        return ", ".join(places)


def resolve(given: Given, *, files: bool = True) -> Settings:
    """Read all places, or without `files` only command line and environment, and let the strongest win, key by key."""
    layers = [_command_line(given), from_environment(), *(_files(given) if files else ())]
    values = {key: f.default for key, f in known_fields().items()}
    origins = dict.fromkeys(values, DEFAULT)
    for layer in reversed(layers):
        for key in _outdone(layer):
            values[key], origins[key] = known_fields()[key].default, DEFAULT
        for key, value in layer.values.items():
            values[key] = value
            origins[key] = f"environment {variable_of(key)}" if layer.origin == "environment" else layer.origin
    return Settings(values, origins)


def _outdone(layer: Layer) -> list[str]:
    """Return the keys of which weaker places have nothing to say any more: see `Section.alternatives`."""
    groups = ([f"{name}.{one}" for one in model.alternatives] for name, model in SECTIONS.items())
    return [key for group in groups if any(layer.values.get(one) for one in group) for key in group]


def active_profile() -> str:
    """Return the profile made active by `dbcap profile use`, or an empty string."""
    path = config_file()
    if not os.path.lexists(path):
        return ""
    name = read_file(path).get(PROFILE_KEY, "")
    if not isinstance(name, str):
        raise ConfigError(f"{path}: profile must be the name of a profile", "run `dbcap profile list`")
    return name


def _files(given: Given) -> list[Layer]:
    """Return the places that are files, strongest first."""
    layers = []
    if given.config is not None:
        layers.append(from_file(Path(given.config), f"--config {given.config}"))
    if named := given.profile or os.environ.get("DBCAP_PROFILE", ""):
        layers.append(profiles.load(named, "named"))
    if os.path.lexists(project_file()):
        layers.append(from_file(project_file(), str(project_file())))
    if active := active_profile():
        layers.append(profiles.load(active, "active"))
    if os.path.lexists(config_file()):
        layers.append(from_file(config_file(), str(config_file()), skip=(PROFILE_KEY,)))
    return layers


def _command_line(given: Given) -> Layer:
    values: dict[str, Any] = {}
    for text in given.assignments:
        key, equals, raw = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text!r} is not of the form KEY=VALUE", "for example --set caption.num_beams=4")
        key = normal_key(key)
        own = f"{given.section}.{key}"
        key = own if own in known_fields() else key
        values[key] = checked(key, raw, f"--set {text}")
    for key, raw in given.options.items():
        values[key] = checked(key, raw, flag_of(key.rpartition(".")[2]))
    return Layer(COMMAND_LINE, values)
