"""The timer and the crontab line of the tutorial do what they say, as systemd and cron would run them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIAL = (Path(__file__).parent.parent / "docs" / "tutorial.md").read_text("utf-8")
PROMPTS = ["a 3d render of a fish on a red background", "a flat drawing of a bird on a white background"]


@pytest.fixture
def person(tmp_path):
    """The home of somebody who installed dbcap for himself and has a list of prompts."""
    command = tmp_path / ".local" / "bin" / "dbcap"
    command.parent.mkdir(parents=True)
    path = os.environ.get("PYTHONPATH", "")
    command.write_text(f"#!/bin/sh\nPYTHONPATH='{path}' exec '{sys.executable}' -m dbcap \"$@\"\n")
    command.chmod(0o755)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return tmp_path


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TUTORIAL, flags=re.DOTALL)


def run(line, home):
    """Run a line with what cron and systemd give: a home, a short path, and nothing else."""
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
    return subprocess.run(["/bin/sh", "-c", line], cwd=home, env=environment, capture_output=True, text=True)


def test_the_crontab_line_makes_new_pictures_every_night(person):
    (block,) = blocks("crontab")
    when, line = re.fullmatch(r"((?:\S+ ){5}) *(.+)\n", block).groups()
    assert when.split() == ["0", "1", "*", "*", "*"]
    assert "%" not in line  # which cron takes for the end of the command
    for night in (1, 2):
        result = run(line, person)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        made = (person / "nightly.txt").read_text().splitlines()
        assert len(set(made)) == len(PROMPTS) * night
    assert sorted(made) == sorted(str(path) for path in (person / "nightly").glob("*.png"))


def test_the_line_of_the_service_makes_what_is_missing(person):
    (line,) = re.findall(r"^ExecStart=(.+)$", TUTORIAL, flags=re.MULTILINE)
    assert "-n 100 " in line
    line = line.replace("%h", str(person)).replace("-n 100 ", "-n 1 ")
    for made in ("2 made", "0 made, 2 there already"):
        result = run(line, person)
        assert result.returncode == 0
        assert made in result.stderr
        assert result.stdout.splitlines() == sorted(str(path) for path in (person / "pictures").glob("*.png"))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd here")
def test_systemd_understands_the_units(person, tmp_path):
    units = tmp_path / "units"
    units.mkdir()
    for name, text in zip(("pictures.service", "pictures.timer"), blocks("ini"), strict=True):
        (units / name).write_text(text.replace("%h", str(person)))
    command = ["systemd-analyze", "verify", *map(str, units.iterdir())]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HOME": str(person)})
    assert [line for line in result.stderr.splitlines() if "pictures." in line] == []
    assert result.returncode == 0
