"""What a plugin hands over is checked here, at once and by name, so that a fault shows where it was made.

Every function returns the thing in the form the loader keeps, or raises an exception that tells the plugin's author
what was expected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from dbcap.plugins.api import API_VERSION, Model, Plugin

if TYPE_CHECKING:
    import typer

Hook = Literal["models", "captioners", "writers"]


class IncompatibleError(Exception):
    """The plugin was written for another API version."""


def as_command(found: object) -> typer.Typer:
    """Accept a `typer.Typer`."""
    import typer

    if not isinstance(found, typer.Typer):
        raise TypeError(f"expected a typer.Typer, found {_kind_of(found)}")
    return found


def as_plugin(found: object) -> Plugin:
    """Accept a plugin, or call a class or factory without arguments that gives one."""
    _check_version(found)  # before a class of another version is called
    if not isinstance(found, Plugin):
        if not callable(found):
            raise TypeError(f"expected a Plugin, its class or a factory of one, found {_kind_of(found)}")
        found = found()
        if not isinstance(found, Plugin):
            raise TypeError(f"expected a factory of a Plugin, but it returned {_kind_of(found)}")
        _check_version(found)
    return found


def _check_version(found: object) -> None:
    version = getattr(found, "api_version", API_VERSION)
    if version != API_VERSION:
        raise IncompatibleError(f"it was written for plugin API version {version}, this dbcap has {API_VERSION}")


def _models(answer: Any, hook: Hook) -> dict[Any, Any]:
    if not hasattr(answer, "__iter__"):
        raise TypeError(f"{hook}() should return Model objects, not {_kind_of(answer)}")
    found: dict[Any, Any] = {}
    for model in answer:
        if not isinstance(model, Model):
            raise TypeError(f"{hook}() should return Model objects, but among them is {_kind_of(model)}")
        if (model.kind, model.name) in found:
            raise ValueError(f"{hook}() returns two models of kind {model.kind} named {model.name}")
        found[model.kind, model.name] = model
    return found


def _factories(answer: Any, hook: Hook) -> dict[Any, Any]:
    if not isinstance(answer, Mapping):
        raise TypeError(f"{hook}() should return a mapping of names to factories, not {_kind_of(answer)}")
    found: dict[Any, Any] = dict(answer)
    for name, factory in found.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"{hook}() should return names, but one is {name!r}")
        if not callable(factory):
            raise TypeError(f"{hook}() should return factories, but {name!r} has {_kind_of(factory)}")
    return found


HOOKS: dict[Hook, Callable[[Any, Hook], dict[Any, Any]]] = {
    "models": _models,
    "captioners": _factories,
    "writers": _factories,
}
"""Each hook and the check of its answer, which makes a dict: models by (kind, name), factories by name."""


def _kind_of(found: object) -> str:
    return "None" if found is None else f"an object of type {type(found).__name__}"
