"""The README's commands are run, and print what it shows; its table of commands is the list of commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dbcap.cli.app import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.usefixtures("home")
def test_the_tour_prints_what_the_readme_shows():
    block = re.search(r"```console\n(.*?)```", README, flags=re.DOTALL)
    assert block
    commands = re.findall(r"^\$ (.*)$", block[1], flags=re.MULTILINE)
    script = "\n".join(f"echo '$ '{_quoted(command)}\n{{ {command}\n}} 2>&1" for command in commands)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert result.stdout == block[1]
    assert result.stderr == ""


def _quoted(command: str) -> str:
    return "'" + command.replace("'", "'\\''") + "'"


def test_the_table_lists_every_command_with_its_help():
    rows = dict(re.findall(r"^\| \[`(\w+)`\]\(docs/commands/\1\.md\) \| (.+) \|$", README, flags=re.MULTILINE))
    assert rows == {name: command.help for name, command in COMMANDS.items()}


def test_every_link_leads_somewhere():
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
