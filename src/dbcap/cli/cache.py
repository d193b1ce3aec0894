"""`dbcap cache`: what dbcap can make again."""

from __future__ import annotations

import shutil

from dbcap.cli.command import Session, plain
from dbcap.cli.config import Json
from dbcap.cli.help import App
from dbcap.cli.output import print_json, print_table
from dbcap.config.paths import cache_dir
from dbcap.files import folder_size, in_units

app = App()


def _parts() -> dict[str, tuple[int, int]]:
    """Return name -> (files, bytes) of each part of the cache."""
    root = cache_dir()
    folders = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    return {folder.name: folder_size(folder) for folder in folders}


@app.command()
@plain
def info(session: Session, as_json: Json = False) -> None:
    """Show what is in the cache. Models of the hub are in its own cache, which other tools share."""
    parts = _parts()
    if as_json:
        print_json({"path": str(cache_dir()), "parts": {n: {"files": f, "bytes": b} for n, (f, b) in parts.items()}})
        return
    session.events.say(f"{cache_dir()}: {in_units(sum(size for _, size in parts.values()))}")
    print_table("Cache", ("part", "files", "size"), [(n, str(f), in_units(b)) for n, (f, b) in parts.items()])


@app.command()
@plain
def clear(session: Session) -> None:
    """Empty the cache. Nothing is lost: dbcap makes again what it needs."""
    total = sum(size for _, size in _parts().values())
    if cache_dir().is_dir():
        for entry in cache_dir().iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    session.events.say(f"{in_units(total)} freed in {cache_dir()}")
