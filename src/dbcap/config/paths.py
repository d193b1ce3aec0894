"""Where dbcap keeps a user's files. `DBCAP_HOME` moves all of it into one folder."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT_FILE = "dbcap.toml"


def _place(kind: str) -> Path:
    import platformdirs

    if home := os.environ.get("DBCAP_HOME"):
        return Path(home).expanduser().absolute()
    return Path(getattr(platformdirs, f"user_{kind}_path")("dbcap", appauthor=False))


def config_file() -> Path:
    """Return the user's `config.toml`."""
    return _place("config") / "config.toml"


def profiles_dir() -> Path:
    """Return the folder of the user's profiles."""
    return _place("config") / "profiles"


def data_dir() -> Path:
    """Return the folder of what dbcap makes and keeps (runs, class images)."""
    return _place("data")


def cache_dir() -> Path:
    """Return the folder of what dbcap can make again (converted weights)."""
    return data_dir() / "cache" if os.environ.get("DBCAP_HOME") else _place("cache")


def project_file() -> Path:
    """Return the project's `dbcap.toml`, in the current folder."""
    try:
        return Path.cwd() / PROJECT_FILE
    except FileNotFoundError:  # the current folder has been deleted: there is nothing in it
        return Path(PROJECT_FILE)
