"""What plugin authors rely on: the names in `dbcap.plugins.api`, its promises, and the docs page with its samples."""

from __future__ import annotations

import configparser
import dataclasses
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from dbcap import errors, events
from dbcap.plugins import api, checks, loader
from dbcap.plugins.api import Candidate, Model, Plugin, Record, Writer

ROOT = Path(__file__).parents[2]
GOOD = ROOT / "tests/plugins/good"
DOCS = (ROOT / "docs/plugins.md").read_text(encoding="utf-8")
HOOKS = [name for name, thing in vars(Plugin).items() if inspect.isfunction(thing)]


def test_every_promised_name_is_there_and_errors_are_dbcaps_own():
    assert set(api.__all__) <= set(vars(api))
    assert api.DbcapError is errors.DbcapError
    assert api.InputError is errors.InputError
    assert api.Events is events.Events


def test_importing_the_api_loads_nothing_heavy():
    code = "import sys, dbcap.plugins.api; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "dbcap.plugins.api" in loaded
    assert not {"torch", "numpy", "PIL", "typer", "pydantic", "importlib.metadata"} & set(loaded)


@pytest.mark.parametrize("name", ["", "org/name", "-x", "a b", "run:x", "ü", None])
def test_a_model_refuses_names_that_a_spec_could_not_hold(name):
    with pytest.raises(ValueError, match="cannot be named"):
        Model(name, "captioner", Path())


def test_a_model_refuses_a_wrong_kind_and_a_folder_that_is_text():
    with pytest.raises(ValueError, match=r"'painter'.*captioner.*diffusion"):
        Model("x", "painter", Path())
    with pytest.raises(ValueError, match="must be a Path"):
        Model("x", "captioner", "folder")
    assert Model("sd-1.5_x", "diffusion", Path()).licence == ""


def test_a_record_gives_its_best_caption_and_is_frozen():
    record = Record("a.jpg", "0" * 64, 4, 3, (Candidate("a cat", -0.1), Candidate("a dog", -0.5)), "m", 0)
    assert record.caption == "a cat"
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.seed = 1
    assert not hasattr(record, "__dict__")


def test_a_plugin_without_hooks_gives_nothing():
    plugin = Plugin()
    assert plugin.api_version == api.API_VERSION
    assert list(checks.HOOKS) == HOOKS
    assert [list(getattr(plugin, hook)()) for hook in HOOKS] == [[]] * len(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hooks_docstring_says_when_what_if_and_how(hook):
    text = " ".join(inspect.getdoc(getattr(Plugin, hook)).split())
    assert "Called when" in text
    assert "An exception sets the plugin aside, and the command goes on." in text
    assert re.search("Must be quick.*and idempotent", text)


def test_the_writer_of_the_good_plugin_has_the_protocols_signatures(monkeypatch):
    monkeypatch.syspath_prepend(str(GOOD))
    from dbcap_good.plugin import Upper

    for name in ("header", "row", "footer"):
        assert inspect.signature(getattr(Upper, name)) == inspect.signature(getattr(Writer, name))
    record = Record("a\udcff.jpg", "", 1, 1, (Candidate("a cat", 0.0),), "m", 0)
    assert Upper().row(record, True) == b"a\xff.jpg\tA CAT\n"


def test_the_samples_in_the_docs_are_the_good_plugin():
    samples = dict(re.findall(r"<!-- (\S+) -->\n```python\n(.*?)```\n", DOCS, re.DOTALL))
    assert sorted(samples) == ["tests/plugins/good/dbcap_good/hello.py", "tests/plugins/good/dbcap_good/plugin.py"]
    assert DOCS.count("```python") == len(samples)
    for path, text in samples.items():
        assert text == (ROOT / path).read_text(encoding="utf-8"), f"docs/plugins.md differs from {path}"


def test_the_entry_points_in_the_docs_are_those_of_the_good_plugin():
    (text,) = re.findall(r"```toml\n(.*?)```", DOCS, re.DOTALL)
    installed = configparser.ConfigParser()
    installed.read(GOOD / "dbcap_good-1.0.dist-info/entry_points.txt", encoding="utf-8")
    groups = {group: dict(installed[group]) for group in installed.sections()}
    assert tomllib.loads(text)["project"]["entry-points"] == groups


def test_the_docs_name_every_hook_status_and_error_class():
    for hook in HOOKS:
        assert f"| `{hook}()` |" in DOCS
    for status in get_args(loader.Status):
        assert f"| `{status}` |" in DOCS
    for name in api.__all__:
        if inspect.isclass(getattr(api, name)) and issubclass(getattr(api, name), Exception):
            assert f"`{name}`" in DOCS
    assert f"{loader.SLOW_SECONDS} s" in DOCS
    assert f"{loader.SWITCH}=none" in DOCS
