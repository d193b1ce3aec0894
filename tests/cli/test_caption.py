"""`dbcap caption` as the shell sees it, and with the model that it takes when none is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dbcap_starter
from dbcap.config.models import CaptionConfig

DEFAULT_CAPTIONER = CaptionConfig.model_fields["model"].default
CAKE = "a flat drawing of a birthday cake on a pink background"


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch) -> None:
    """On a busy machine two threads wait for each other longer than they work."""
    import torch

    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def photos(project) -> list[Path]:
    """Three of the samples."""
    samples = sorted(dbcap_starter.samples().glob("*.png"))[:3]
    return [Path(shutil.copyfile(sample, project / f"{name}.png")) for name, sample in zip("abc", samples, strict=True)]


def test_a_fresh_process_says_nothing_but_the_caption_in_any_locale(photos):
    name = os.fsdecode(b"\xc3\xa9 \xff.png")
    shutil.copyfile("a.png", name)
    words = [sys.executable, "-m", "dbcap", "caption", name, "--profile", "starter", "--format", "tsv"]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, capture_output=True, env=environment, timeout=300, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == os.fsencode(name) + b"\t" + CAKE.encode() + b"\n"


def test_a_reader_that_has_enough_ends_it_quietly(photos, bash, project):
    (project / "many").mkdir()
    for number in range(200):
        os.link("a.png", f"many/{number:03}.png")
    result = bash(
        """
        dbcap caption many --profile starter --num-beams 1 --format jsonl --batch-size 4 | head -1
        echo ${PIPESTATUS[0]}
        find . -maxdepth 1 -name '?.png' -print0 | sort -z | dbcap caption -0 - --profile starter | cut -f 2 | head -1
        """
    )
    row, code, line = result.out.splitlines()
    assert json.loads(row)["path"] == "many/000.png"
    assert (code, line) == ("0", CAKE)
    assert result.err == ""


def test_on_a_terminal_there_is_progress_and_elsewhere_none(photos, on_terminal):
    code, shown = on_terminal("-m", "dbcap", "caption", ".", "--profile", "starter", "-o", "out")
    assert code == 0
    assert "Captioning" in shown
    assert "images/s" in shown or "3/3" in shown
    assert "3 captioned, 0 failed: out" in shown
    assert Path("out").read_text().count("\n") == 3
    code, shown = on_terminal("-m", "dbcap", "caption", "a.png", "none.png", "-h", "--profile", "starter")
    assert code == 3
    assert "Captioning" not in shown, "the bar would stand in the line of a caption"
    assert CAKE in shown.splitlines()


# ---- the default model, from a hub


@pytest.fixture
def published(hub, published_model):
    """A hub that has the default model."""
    served = hub()
    shutil.copytree(published_model, served.repo(DEFAULT_CAPTIONER), dirs_exist_ok=True)
    return served


def test_the_default_model_is_fetched_and_then_works_offline(photos, published, cli):
    first = cli("caption", "a.png")
    assert first.code == 0
    assert len(first.out.split()) > 1
    again = cli("caption", "a.png", "--offline")
    assert (again.code, again.out, again.err) == (0, first.out, "")
    published.stop()
    rows = cli("caption", "a.png", "b.png", "--format", "jsonl", "--dtype", "float32")
    assert rows.code == 0
    assert [json.loads(line)["model"] for line in rows.out.splitlines()] == [DEFAULT_CAPTIONER] * 2
    assert not Path("a.txt").exists()


def test_the_cards_settings_stand_where_the_model_names_none(photos, published, cli):
    words = ["caption", "a.png", "b.png", "-h", "--dtype", "float32"]
    usual = cli(*words)
    assert usual.code == 0
    assert cli(*words, "--num-beams", "1", "--max-length", "16").out == usual.out
    longer = cli(*words, "--max-length", "40")
    assert longer.code == 0
    assert all(new.startswith(old) for old, new in zip(usual.out.splitlines(), longer.out.splitlines(), strict=True))


def test_without_a_hub_it_says_what_works(photos, cli, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    result = cli("caption", "a.png")
    assert result.code == 1
    assert f"dbcap models pull {DEFAULT_CAPTIONER}" in result.error
    assert "--profile starter" in result.error
    result = cli("caption", "a.png", "--profile", "starter")
    assert (result.code, result.out, result.err) == (0, f"{CAKE}\n", "")


# ---- options


def test_options_come_from_every_place(photos, cli, monkeypatch):
    Path("dbcap.toml").write_text('[caption]\nmodel = "starter"\nprefix = "file "\n')
    assert cli("caption", "a.png").out == f"file {CAKE}\n"
    monkeypatch.setenv("DBCAP_CAPTION__PREFIX", "env ")
    assert cli("caption", "a.png").out == f"env {CAKE}\n"
    assert cli("caption", "a.png", "--prefix", "").out == f"{CAKE}\n"
    assert cli("caption", "a.png", "--set", "caption.suffix=!").out == f"env {CAKE}!\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "missing argument"),
        (["a.png", "--num-beams", "none"], "num_beams|num-beams"),
        (["a.png", "--existing", "sometimes"], "skip, overwrite, append, prepend, error"),
        (["a.png", "--no-such"], "no such option"),
        (["a.png", "--alpha", "pink"], "'pink' is not allowed: it must be white, black or #rrggbb"),
    ],
)
def test_wrong_usage_is_one_line(words, line, photos, cli):
    result = cli("caption", *words)
    assert result.code == 2
    assert any(part in result.error for part in line.split("|"))
