"""What is generated is up to date, and what is promised is frozen: pages of the docs, help texts, options.

UPDATE_GOLDEN=1 writes tests/golden anew: `UPDATE_GOLDEN=1 pytest tests/test_docs.py`.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest

from dbcap.cli.app import COMMANDS, app
from dbcap.config import fields
from dbcap.config.layers import known_fields
from dbcap.config.models import SECTIONS

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
UPDATE = os.environ.get("UPDATE_GOLDEN") == "1"
HOW = "if that is meant, run `UPDATE_GOLDEN=1 pytest tests/test_docs.py`, and say so in the changelog"


def _generator():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _generator()
WAYS = {(): None} | {way: command for name in COMMANDS for way, command in generate.ways(name).items()}


@pytest.fixture(autouse=True)
def _isolated(home):
    pass


def test_the_pages_made_from_the_code_are_up_to_date():
    stale = [str(path.relative_to(ROOT)) for path in generate.stale(generate.pages())]
    assert stale == [], "run `make docs`"


def test_check_names_what_is_out_of_date_and_without_it_the_pages_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "DOCS", tmp_path / "docs")
    monkeypatch.setattr("sys.argv", ["generate.py", "--check"])
    assert generate.main() == 1
    assert "docs/commands/caption.md is out of date: run `make docs`" in capsys.readouterr().out
    assert not (tmp_path / "docs").exists()
    monkeypatch.setattr("sys.argv", ["generate.py"])
    (tmp_path / "docs" / "commands").mkdir(parents=True)
    (tmp_path / "docs" / "commands" / "gone.md").touch()
    assert generate.main() == 0
    assert not (tmp_path / "docs" / "commands" / "gone.md").exists()
    monkeypatch.setattr("sys.argv", ["generate.py", "--check"])
    assert generate.main() == 0


def test_every_key_is_in_the_table_of_settings_with_all_that_is_known_of_it():
    rows = {}
    for line in generate.config_page().splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            rows[cells[0].strip("`")] = cells[1:]
    assert list(rows) == list(known_fields())
    for key, (variable, takes, default, meaning) in rows.items():
        field = known_fields()[key]
        assert variable == f"`{fields.variable_of(key)}`"
        assert (takes, meaning) == (fields.allowed(field), field.description)
        assert default == fields.default_text(field)


def test_every_option_is_on_the_page_of_its_command():
    for section, model in SECTIONS.items():
        page = (ROOT / "docs" / "commands" / f"{section}.md").read_text("utf-8")
        for name, field in model.model_fields.items():
            flag = fields.flag_of(name)
            if not fields.cli_of(field).argument:
                assert flag in page or f"--[no-]{flag[2:]}" in page, flag


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(way) or "dbcap")
def test_the_help_is_as_it_was(way):
    check_golden(GOLDEN / "help" / f"{'-'.join(way) or 'dbcap'}.txt", generate.help_of(*way) + "\n")


def check_golden(path: Path, text: str) -> None:
    if UPDATE:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    assert path.is_file(), HOW
    assert text == path.read_text("utf-8"), HOW


def test_every_help_text_in_golden_belongs_to_a_command():
    known = {f"{'-'.join(way) or 'dbcap'}.txt" for way in WAYS}
    left = [path for path in (GOLDEN / "help").iterdir() if path.name not in known]
    if UPDATE:
        for path in left:
            path.unlink()
        left = []
    assert left == [], HOW


def options() -> list[str]:
    """Return a line for every option and argument: command, flags, metavar."""
    import typer

    root = typer.main.get_command(app)
    lines = []
    for way, command in (WAYS | {(): root}).items():
        for param in command.params:
            names = [*param.opts, *param.secondary_opts] if param.param_type_name == "option" else []
            kind = param.metavar if param.metavar is not None else "" if names and param.is_flag else param.name.upper()
            words = " ".join(names) or ("ARGUMENT..." if param.nargs == -1 else "ARGUMENT")
            lines.append(" | ".join((" ".join(("dbcap", *way)), words, kind or "")).rstrip(" |"))
    return sorted(lines)


def test_no_option_comes_goes_or_changes_unseen():
    found, path = options(), GOLDEN / "options.txt"
    if UPDATE:
        path.write_text("\n".join(found) + "\n", "utf-8")
    frozen = path.read_text("utf-8").splitlines()
    added = sorted(set(found) - set(frozen))
    removed = sorted(set(frozen) - set(found))
    assert not added + removed, "\n".join([*(f"added: {x}" for x in added), *(f"removed: {x}" for x in removed), HOW])
