"""Finds plugins and loads them one by one, so that a broken one fails alone. A fault is data: a `LoadReport`.

Own loop instead of pluggy, which lets the first failing import end them all. Nothing is imported before it is needed:
the names of commands come from the metadata of the installed distributions, a command's module is imported when the
command is typed, a plugin when something asks for models, captioners or writers.

`DBCAP_PLUGINS=none` loads nothing; `DBCAP_PLUGINS=a,b` only the entry points or distributions of these names.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dbcap.errors import DbcapError, Interrupted, did_you_mean
from dbcap.plugins.api import CaptionerFactory, Model, WriterFactory
from dbcap.plugins.checks import HOOKS, Hook, IncompatibleError, as_command, as_plugin

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    import typer

COMMANDS = "dbcap.commands"
PLUGINS = "dbcap.plugins"
SWITCH = "DBCAP_PLUGINS"
SLOW_SECONDS = 0.5

Status = Literal["ok", "failed", "disabled", "shadowed", "incompatible"]
_T = TypeVar("_T")


class PluginError(DbcapError):
    """A plugin that the user asked for by name cannot be loaded."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of one entry point, or of one thing that a plugin gives."""

    name: str
    group: str
    """`dbcap.commands`, `dbcap.plugins`, `dbcap.plugins: HOOK` for a single thing that is shadowed, or the switch."""
    value: str
    """`module:attribute`."""
    distribution: str
    version: str
    status: Status
    error: str
    """One line: the exception's type and message, or who shadows it; empty where all is well."""
    seconds: float
    """Spent in its import and its hooks; 0 where nothing was run."""

    @property
    def slow(self) -> bool:
        """It holds up every command that needs it."""
        return self.seconds > SLOW_SECONDS


@dataclass(frozen=True)
class CommandEntry:
    """A command that a plugin offers, not imported yet."""

    name: str
    distribution: str
    _item: _Item = field(repr=False)

    def load(self) -> typer.Typer:
        """Import the command. Raises `PluginError`, which names the plugin, its distribution and the fault."""
        _load(self._item, as_command)
        if self._item.status != "ok":
            raise PluginError(
                f"the plugin command {self.name} of {self._item.origin} cannot be loaded: {self._item.error}",
                "see `dbcap plugins doctor`",
            ) from self._item.cause
        app: typer.Typer = self._item.loaded
        return app


@dataclass(eq=False)
class _Item:
    """An entry point and what is known about it so far."""

    point: EntryPoint
    distribution: str
    version: str
    status: Status = "ok"
    error: str = ""
    cause: BaseException | None = None
    seconds: float = 0.0
    loaded: Any = None
    answers: dict[Hook, dict[Any, Any]] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        return f"{self.distribution} {self.version}".strip()

    def report(self) -> LoadReport:
        point = self.point
        return LoadReport(
            point.name, point.group, point.value, self.distribution, self.version, self.status, self.error, self.seconds
        )


@dataclass
class _State:
    """All that one process knows of plugins."""

    items: list[_Item]
    unreadable: list[LoadReport]
    unknown: list[str]
    """Names in DBCAP_PLUGINS that nothing installed bears."""
    builtin: dict[str, frozenset[str]] = field(default_factory=dict)
    clashes: dict[tuple[str, str, Hook, str], LoadReport] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    untold: list[str] = field(default_factory=list)

    def tell(self, problem: str) -> None:
        if problem not in self.told:
            self.told.add(problem)
            self.untold.append(problem)


# ---- what the rest of dbcap calls


def commands(builtin: Collection[str]) -> dict[str, CommandEntry]:
    """Return the plugin commands by name, from metadata alone. One that is named like a built-in is left out."""
    if _wanted() == []:  # spares `DBCAP_PLUGINS=none dbcap --help` the search
        return {}
    state = _state()
    state.builtin[COMMANDS] = frozenset(builtin)
    items = [item for item in state.items if item.point.group == COMMANDS]
    for item in items:
        if item.status == "ok" and item.point.name in builtin:
            item.status, item.error = "shadowed", "dbcap itself has a command of this name"
    return {
        item.point.name: CommandEntry(item.point.name, item.distribution, item)
        for item in items
        if item.status not in ("disabled", "shadowed")
    }


def models(builtin: Collection[str] = ()) -> tuple[Model, ...]:
    """Return the models of all plugins; a name occurs once a kind, and never one of `builtin`."""
    return tuple(_merge("models", builtin).values())


def captioners(builtin: Collection[str] = ()) -> dict[str, CaptionerFactory]:
    """Return the captioner factories of all plugins by `model_type`, without those in `builtin`."""
    return _merge("captioners", builtin)


def writers(builtin: Collection[str] = ()) -> dict[str, WriterFactory]:
    """Return the writer factories of all plugins by format name, without those in `builtin`."""
    return _merge("writers", builtin)


def problems() -> list[str]:
    """Return, each only once, what was found wrong with plugins since the last call: one line each."""
    if not _state.cache_info().currsize:  # nothing has asked for plugins: no search for the sake of a warning
        return []
    state = _state()
    found, state.untold = state.untold, []
    return found


def reports(deep: bool) -> list[LoadReport]:
    """Return a report on every entry point, by group, distribution and name, then on what else is wrong.

    Without `deep` nothing is imported. With it every command and plugin that is not disabled or shadowed is imported
    and every hook called; names in DBCAP_PLUGINS that nothing installed bears are reported too, and `problems` has
    nothing to add. What was given as `builtin` to the functions above before counts as taken here as well.
    """
    state = _state()
    if deep:
        for item in state.items:
            if item.point.group == COMMANDS:
                _load(item, as_command)
        for hook in HOOKS:
            _merge(hook, state.builtin.get(hook, ()))
        for item in state.items:
            _check_folders(item)
        state.untold.clear()
    found = [*(item.report() for item in state.items), *state.unreadable, *state.clashes.values()]
    if deep:
        found += [_unknown_report(name, state.items) for name in state.unknown]
    return found


def reset() -> None:
    """Forget everything (for tests): the next call looks again at what is installed and at DBCAP_PLUGINS."""
    _state.cache_clear()


# ---- finding


@functools.cache
def _state() -> _State:
    items, unreadable = _installed()
    wanted = _wanted()
    if wanted is not None:
        for item in items:
            if not any(_bears(item, name) for name in wanted):
                item.status, item.error = "disabled", f"by {SWITCH}={os.environ[SWITCH]}"
    unknown = [name for name in wanted or () if not any(_bears(item, name) for item in items)]
    first: dict[tuple[str, str], _Item] = {}
    for item in items:
        if item.status == "ok":
            winner = first.setdefault((item.point.group, item.point.name), item)
            if winner is not item:
                item.status, item.error = "shadowed", f"{winner.origin} has one of this name"
    return _State(items, unreadable, unknown)


def _installed() -> tuple[list[_Item], list[LoadReport]]:
    """Return all entry points of our groups, in a fixed order, and reports on metadata that cannot be read."""
    from importlib.metadata import distributions

    items: list[_Item] = []
    unreadable: list[LoadReport] = []
    seen: set[str] = set()
    for distribution in distributions():
        name = version = ""
        try:
            if "dbcap." not in (distribution.read_text("entry_points.txt") or ""):
                continue
            name, version = distribution.name, distribution.version
            if _plain(name) in seen:  # a copy further down the path, which an import would not reach either
                continue
            seen.add(_plain(name))
            points = [point for group in (COMMANDS, PLUGINS) for point in distribution.entry_points.select(group=group)]
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one distribution's files stays with it
            fault = f"the metadata under {distribution.locate_file('')} cannot be read: {_one_line(error)}"
            unreadable.append(LoadReport(name or "?", "", "", name or "?", version or "", "failed", fault, 0.0))
        else:
            items += [_Item(point, name, version) for point in points]
    items.sort(key=lambda item: (item.point.group, _plain(item.distribution), item.point.name))
    return items, unreadable


def _wanted() -> list[str] | None:
    """Return the names in DBCAP_PLUGINS; None means all, an empty list none."""
    names = [name.strip() for name in os.environ.get(SWITCH, "").split(",") if name.strip()]
    if names == ["none"]:
        return []
    return names or None


def _bears(item: _Item, name: str) -> bool:
    return name == item.point.name or _plain(name) == _plain(item.distribution)


def _plain(name: str) -> str:
    """Return a distribution's name in the one spelling that PEP 503 gives it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _unknown_report(name: str, items: list[_Item]) -> LoadReport:
    known = {item.point.name for item in items} | {item.distribution for item in items}
    near = did_you_mean(name, sorted(known))
    fault = f"no installed plugin or distribution has this name{', ' if near else ''}{near}"
    return LoadReport(name, SWITCH, "", "", "", "failed", fault, 0.0)


# ---- loading, contained


def _load(item: _Item, convert: Callable[[object], object]) -> None:
    """Import what the entry point names and keep `convert` of it; the second time nothing happens."""
    if item.loaded is None and item.status == "ok":
        item.loaded = _contained(item, lambda: convert(item.point.load()))


def _contained(item: _Item, work: Callable[[], _T]) -> _T | None:
    """Do a plugin's work; where it fails in any way, set the plugin aside and return None."""
    for stream in (sys.stdout, sys.__stdout__):
        if stream and not stream.closed:
            stream.flush()  # what is ours must not go the plugin's way, and a broken pipe is no fault of the plugin
    start = time.perf_counter()
    try:
        with _stdout_to_stderr():
            return work()
    except (KeyboardInterrupt, Interrupted):
        raise
    except IncompatibleError as error:
        item.status, item.error = "incompatible", str(error)
    except BaseException as error:  # noqa: BLE001 - containment is the point: sys.exit() in a plugin counts too
        item.status, item.error, item.cause = "failed", _one_line(error), error
    finally:
        item.seconds += time.perf_counter() - start
    return None


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what is printed to stderr, also by C code and by child processes, so that our own stdout stays clean."""
    saved = -1
    with contextlib.suppress(OSError):  # one of the two may be closed
        saved = os.dup(1)
        os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        with contextlib.suppress(OSError, ValueError):  # written past the redirection, to sys.__stdout__ itself
            if sys.__stdout__:
                sys.__stdout__.flush()
        if saved >= 0:
            os.dup2(saved, 1)
            os.close(saved)


def _one_line(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - a plugin's exception class may be broken too
        text = "(its message cannot be read)"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# ---- hooks


def _merge(hook: Hook, builtin: Collection[str]) -> dict[Any, Any]:
    """Return what the hook gives over all plugins; the first of a name wins, the others are reported."""
    state = _state()
    state.builtin[hook] = frozenset(builtin)
    merged: dict[Any, Any] = {}
    owner: dict[Any, str] = {}
    for item in state.items:
        if item.point.group != PLUGINS or item.status == "disabled":
            continue
        _ask(item, hook)
        if item.status != "ok":
            state.tell(f"the plugin {item.point.name} of {item.origin} is not used: {item.error}")
            continue
        for key, thing in item.answers[hook].items():
            name = thing.name if isinstance(thing, Model) else key
            winner = "dbcap itself" if name in builtin else owner.setdefault(key, item.origin)
            if key in merged or name in builtin:
                _clash(state, item, hook, name, winner)
            else:
                merged[key] = thing
    return merged


def _ask(item: _Item, hook: Hook) -> None:
    """Load the plugin if need be and keep the checked answer of its hook; the second time nothing happens."""
    _load(item, as_plugin)
    if item.status == "ok" and hook not in item.answers:
        answer = _contained(item, lambda: HOOKS[hook](getattr(item.loaded, hook)(), hook))
        if answer is not None:
            item.answers[hook] = answer


def _clash(state: _State, item: _Item, hook: Hook, name: str, winner: str) -> None:
    fault = f"{winner} has one of this name"
    state.clashes[item.distribution, item.point.name, hook, name] = LoadReport(
        name, f"{PLUGINS}: {hook}", item.point.value, item.distribution, item.version, "shadowed", fault, 0.0
    )
    state.tell(f"{name}, of the {hook} of the plugin {item.point.name} of {item.origin}, is not used: {fault}")


def _check_folders(item: _Item) -> None:
    """Fail a plugin whose models are not where it says; only the doctor looks."""
    for model in item.answers.get("models", {}).values():
        if item.status == "ok" and not model.folder.is_dir():
            item.status, item.error = "failed", f"the folder of the model {model.name} is missing: {model.folder}"
