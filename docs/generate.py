"""Write docs/commands/*.md and docs/config.md from the code; with --check only say what is out of date."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from dbcap.cli.app import COMMANDS, app
from dbcap.config import fields
from dbcap.config.layers import known_fields

DOCS = Path(__file__).parent
NOTE = "<!-- made by `make docs`; do not edit -->\n\n"
ENVIRONMENT = {"COLUMNS": "80", "NO_COLOR": "1", "DBCAP_PLUGINS": "none"}


def help_of(*words: str) -> str:
    """Return what `dbcap WORDS --help` prints."""
    result = CliRunner(env=ENVIRONMENT).invoke(app, [*words, "--help"], prog_name="dbcap")
    if result.exit_code:
        raise SystemExit(f"dbcap {' '.join(words)} --help ends with {result.exit_code}: {result.output}")
    return "\n".join(line.rstrip() for line in result.output.strip("\n").splitlines())


def ways(name: str) -> dict[tuple[str, ...], Any]:
    """Return a command and its sub-commands: the words that are typed -> typer's command."""
    command: Any = typer.main.get_command(import_module(COMMANDS[name].module).app)
    return {(name,): command, **{(name, sub): found for sub, found in getattr(command, "commands", {}).items()}}


def command_page(name: str) -> str:
    """Return the page of one command, its sub-commands included."""
    parts = [f"## dbcap {' '.join(way)}\n\n```text\n{help_of(*way)}\n```\n" for way in ways(name)]
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


def pages() -> dict[Path, str]:
    """Return every page that is made here, with its text."""
    return {
        **{DOCS / "commands" / f"{name}.md": command_page(name) for name in COMMANDS},
        DOCS / "config.md": config_page(),
    }


def stale(wanted: dict[Path, str]) -> list[Path]:
    """Return the pages that say something else, are missing, or belong to no command."""
    changed = [path for path, text in wanted.items() if not path.is_file() or path.read_text("utf-8") != text]
    return changed + sorted(path for path in (DOCS / "commands").glob("*.md") if path not in wanted)


def main() -> int:
    """Write the pages, or with --check name those that are out of date. Returns the exit code."""
    wanted = pages()
    for path in stale(wanted):
        if "--check" in sys.argv:
            print(f"{path.relative_to(DOCS.parent)} is out of date: run `make docs`")
        elif path in wanted:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted[path], "utf-8")
        else:
            path.unlink()
    return int("--check" in sys.argv and bool(stale(wanted)))


if __name__ == "__main__":
    sys.exit(main())
