"""Write docs/commands/*.md and docs/config.md from the code; with --check only say what is out of date."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ |= {"COLUMNS": "100", "NO_COLOR": "1", "DBCAP_PLUGINS": "none", "TERM": "dumb"}

import typer
from typer.testing import CliRunner

from dbcap.cli.app import COMMANDS, app
from dbcap.config import fields
from dbcap.config.layers import known_fields

DOCS = Path(__file__).parent
NOTE = "<!-- made by `make docs`; do not edit -->\n\n"


def help_of(*words: str) -> str:
    """Return what `dbcap WORDS --help` prints."""
    result = CliRunner().invoke(app, [*words, "--help"], prog_name="dbcap")
    if result.exit_code:
        raise SystemExit(f"dbcap {' '.join(words)} --help ends with {result.exit_code}: {result.output}")
    return "\n".join(line.rstrip() for line in result.output.strip("\n").splitlines())


def command_page(name: str) -> str:
    """Return the page of one command, its sub-commands included."""
    group: Any = typer.main.get_command(import_module(COMMANDS[name].module).app)
    ways = [(name,), *((name, sub) for sub in getattr(group, "commands", {}))]
    parts = [f"## dbcap {' '.join(way)}\n\n```text\n{help_of(*way)}\n```\n" for way in ways]
    return f"{NOTE}# dbcap {name}\n\n{COMMANDS[name].help}\n\n" + "\n".join(parts)


def config_page() -> str:
    """Return the table of all keys."""
    head = (
        f"{NOTE}# Settings\n\n"
        "A value may come from seven places; the first that holds it wins: the command line (`--num-beams 4`, or\n"
        "`--set caption.num_beams=4`), the environment, the file of `--config FILE` (TOML or YAML), the profile named\n"
        "by `--profile` or `DBCAP_PROFILE`, `dbcap.toml` in the current folder, the profile made active by\n"
        "`dbcap profile use`, the user's `config.toml`. `dbcap config show --origin` says where each value comes\n"
        "from.\n\n"
        "In a file a key `caption.num_beams` is `num_beams` in the table `[caption]`; keys without a dot stand at the\n"
        "top.\n\n"
        "| key | variable | takes | default | meaning |\n|---|---|---|---|---|\n"
    )
    rows = []
    for key, field in known_fields().items():
        cells = (
            f"`{key}`",
            f"`{fields.variable_of(key)}`",
            fields.allowed(field),
            fields.default_text(field),
            field.description,
        )
        rows.append("| " + " | ".join(str(cell or "").replace("|", "\\|") for cell in cells) + " |\n")
    other = (
        "\nOther variables: `DBCAP_HOME` moves all of dbcap's files into one folder, `DBCAP_PROFILE` names a profile,\n"
        "`DBCAP_PLUGINS` chooses plugins (`none`, or a list of names), `DBCAP_DEBUG=1` shows tracebacks. `NO_COLOR`,\n"
        "`HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean elsewhere.\n"
    )
    return head + "".join(rows) + other


def main() -> int:
    """Write the pages, or with --check compare them. Returns the exit code."""
    pages = {DOCS / "commands" / f"{name}.md": command_page(name) for name in COMMANDS}
    pages[DOCS / "config.md"] = config_page()
    stale = [path for path, text in pages.items() if not path.is_file() or path.read_text("utf-8") != text]
    stale += [path for path in (DOCS / "commands").glob("*.md") if path not in pages]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(DOCS.parent)} is out of date: run `make docs`")
        return int(bool(stale))
    for path in stale:
        if path in pages:
            path.parent.mkdir(exist_ok=True)
            path.write_text(pages[path], "utf-8")
        else:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
