"""What `plugins list` and `plugins doctor` show, what DBCAP_PLUGINS leaves out, and what a running command is told."""

from __future__ import annotations

import sys

import pytest

from dbcap.plugins import loader
from dbcap.plugins.loader import LoadReport

# ---- DBCAP_PLUGINS


@pytest.mark.parametrize(
    ("value", "commands", "plugins"),
    [
        ("", True, True),
        (" , ", True, True),
        ("none", False, False),
        ("dbcap-good", True, True),
        ("x, DBCAP_good ", True, True),
        ("hello", True, False),
        ("good", False, True),
        ("slow", False, False),
    ],
)
def test_the_switch_picks_by_entry_point_or_distribution(add, monkeypatch, value, commands, plugins, report):
    add("good")
    monkeypatch.setenv(loader.SWITCH, value)
    assert ("hello" in loader.commands([])) == commands
    assert ("upper" in loader.writers()) == plugins
    assert report("hello", deep=False).status == ("ok" if commands else "disabled")
    assert report("good", deep=False).status == ("ok" if plugins else "disabled")
    assert loader.problems() == []


def test_what_is_disabled_is_not_imported_by_the_doctor_either(add, monkeypatch, report):
    add("good", "broken")
    monkeypatch.setenv(loader.SWITCH, "none")
    found = loader.reports(deep=True)
    assert {one.status for one in found} == {"disabled"}
    assert report("good", deep=True).error == "by DBCAP_PLUGINS=none"
    assert not [name for name in sys.modules if name.startswith(("dbcap_good", "dbcap_broken"))]


def test_the_doctor_reports_names_in_the_switch_that_nothing_bears(add, monkeypatch):
    add("good")
    monkeypatch.setenv(loader.SWITCH, "dbcap-good,dbcap-god,none")
    near, none = [one for one in loader.reports(deep=True) if one.group == loader.SWITCH]
    assert (near.name, near.status) == ("dbcap-god", "failed")
    assert near.error == "no installed plugin or distribution has this name, did you mean dbcap-good?"
    assert none.name == "none"
    assert loader.problems() == []


# ---- reports


def test_the_list_imports_nothing(add):
    add("good", "broken", "slow")
    found = {one.name: one for one in loader.reports(deep=False)}
    expected = LoadReport("slow", "dbcap.plugins", "dbcap_slow:plugin", "dbcap-slow", "1.0", "ok", "", 0.0)
    assert found["slow"] == expected
    assert {"hello", "good", "broken-command", "broken-import", "broken-hook"} <= set(found)
    assert {one.status for one in found.values()} == {"ok"}
    assert not [name for name in sys.modules if name.startswith(("dbcap_good", "dbcap_broken", "dbcap_slow"))]


def test_the_doctor_names_every_fault_and_the_slow_one(add):
    add("good", "broken", "slow")
    found = {one.name: one for one in loader.reports(deep=True)}
    statuses = {name: found[name].status for name in ("hello", "good", "slow")}
    assert statuses == {"hello": "ok", "good": "ok", "slow": "ok"}
    assert found["slow"].slow
    assert 0.7 <= found["slow"].seconds < 5
    assert not found["good"].slow
    for name in ("broken-command", "broken-import"):
        assert found[name].status == "failed"
        assert found[name].error == "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"
    assert found["broken-hook"].error == "RuntimeError: the list of models is not to be had"
    assert loader.problems() == []


def test_the_doctor_misses_the_folder_of_a_model(make, report):
    make("lost", "class it(Plugin):\n    def models(self): return [Model('gone', 'captioner', Path('/no/such'))]\n")
    assert report("lost", deep=False).status == "ok"
    found = report("lost", deep=True)
    assert found.status == "failed"
    assert "the model gone is missing" in found.error


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("entry_points.txt", b"[dbcap.plugins]\nno equals sign here\n"),
        ("entry_points.txt", b"[dbcap.plugins]\n\xff = x:y\n"),
        ("METADATA", b"Metadata-Version: 2.1\n"),
    ],
)
def test_metadata_that_cannot_be_read_is_reported_and_harms_no_other(make, add, tmp_path, file, content):
    make("torn", "it = Plugin()")
    (tmp_path / "torn/torn-2.5.dist-info" / file).write_bytes(content)
    add("good")
    assert "hello" in loader.commands([])
    (found,) = [one for one in loader.reports(deep=True) if one.status == "failed"]
    assert str(tmp_path / "torn") in found.error
    assert "\n" not in found.error


def test_a_copy_further_down_the_path_counts_once(make, monkeypatch, tmp_path, report):
    make("twice", "it = Plugin()")
    info = tmp_path / "copy/twice-2.4.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: Twice\nVersion: 2.4\n")
    (info / "entry_points.txt").write_text("[dbcap.plugins]\ntwice = plug_twice:it\n")
    monkeypatch.syspath_prepend(str(tmp_path / "copy"))
    loader.reset()
    assert report("twice", deep=True).version == "2.4"


def test_problems_are_silent_until_something_asked_for_plugins(add):
    add("broken")
    assert loader.problems() == []
    loader.commands([])
    assert loader.problems() == []
    loader.models()
    assert sorted(text.split()[2] for text in loader.problems()) == ["broken-hook", "broken-import"]
    loader.models()
    assert loader.problems() == []
