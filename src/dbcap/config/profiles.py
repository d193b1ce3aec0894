"""Profiles: named sets of settings, one TOML file each; some come with dbcap."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbcap.config.layers import Layer, checked, from_file
from dbcap.config.paths import config_file, profiles_dir
from dbcap.errors import ConfigError, UsageError, did_you_mean

_COLOURS = "white black red green blue yellow orange purple pink brown gray".split()  # noqa: SIM905 - readable
_STARTER_PHOTOS: Mapping[str, Any] = {
    "model": "starter",
    "captioner": "starter",
    "size": 64,
    "template": "a 3d render of a [V] {class}",
    "class_images": 110,
    "class_prompts": tuple(f"a 3d render of a {{class}} on a {colour} background" for colour in _COLOURS),
    "class_steps": 20,
}
BUILTIN: Mapping[str, Mapping[str, Any]] = {
    # The models of the package dbcap-starter: everything works offline.
    "starter": {
        "caption.model": "starter",
        "generate.model": "starter",
        "generate.steps": 20,
        "generate.guidance": 3.0,
        **{f"{command}.{key}": value for command in ("prep", "train") for key, value in _STARTER_PHOTOS.items()},
        "train.lr": 1e-5,
        "train.steps": 400,
        "train.batch_size": 4,
        "train.sample_guidance": 3.0,
    },
}


def _is_name(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) is not None


def profile_path(name: str) -> Path:
    """Return where the user's profile of that name is kept. Raises UsageError for a name that is no file name."""
    if not _is_name(name):
        raise UsageError(f"{name!r} is no profile name", "use letters, digits, dot, dash and underscore")
    return profiles_dir() / f"{name}.toml"


def names() -> list[str]:
    """Return the names of all profiles: those that come with dbcap, then the user's."""
    folder = profiles_dir()
    own = sorted(p.stem for p in folder.glob("*.toml")) if folder.is_dir() else []
    return [*BUILTIN, *(name for name in own if name not in BUILTIN and _is_name(name))]


def load(name: str, role: str) -> Layer:
    """Read a profile. `role` (`named` or `active`) tells the two places of a profile apart."""
    origin = f"profile {name} ({role})"
    if name in BUILTIN:
        return Layer(origin, {key: checked(key, value, origin) for key, value in BUILTIN[name].items()})
    path = profile_path(name)
    if not path.is_file():
        if role == "active":
            raise ConfigError(
                f"there is no profile {name}, which {config_file()} makes active",
                "`dbcap profile use --none` makes none active",
            )
        near = did_you_mean(name, names())
        raise ConfigError(f"there is no profile {name}", near or f"the profiles are {', '.join(names())}")
    return from_file(path, origin)
