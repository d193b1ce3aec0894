"""`dbcap plugins` and plugin commands, with real distributions: a good one, a broken one and a slow one."""

from __future__ import annotations

import json
import os

import pytest


@pytest.fixture
def all_three(plugins, project):
    plugins("good", "broken", "slow")


def test_a_plugins_command_is_listed_and_works(process, all_three):
    code, out, err = process("--help")
    assert (code, err) == (0, "")
    assert "  hello           (plugin dbcap-good)\n" in out
    assert "  broken-command  (plugin dbcap-broken)\n" in out
    assert process("hello") == (0, "hello world\n", "")
    assert process("hello", "Ann") == (0, "hello Ann\n", "")
    assert process("hello", "--help").out.split()[:3] == ["Usage:", "dbcap", "hello"]
    assert process("hello", "a", "b").error.startswith("dbcap hello: got unexpected extra argument")


def test_a_broken_plugin_fails_alone(process, all_three):
    assert process("--help").code == 0
    assert process("config", "show")[::2] == (0, "")
    result = process("broken-command")
    assert result.code == 1
    assert result.error == (
        "the plugin command broken-command of dbcap-broken 1.0 cannot be loaded: "
        "ModuleNotFoundError: No module named 'a_module_that_is_not_there'; see `dbcap plugins doctor`"
    )


def test_the_doctor_names_every_fault_and_who_is_slow(process, all_three):
    code, out, err = process("plugins", "doctor")
    assert code == 1
    rows = {row.split("\t")[0]: row.split("\t")[1:] for row in out.splitlines()}
    assert rows["hello"] == ["dbcap.commands", "dbcap-good 1.0", "ok", ""]
    assert rows["slow"][2] == "ok (slow)"
    assert rows["broken-hook"] == [
        "dbcap.plugins", "dbcap-broken 1.0", "failed", "RuntimeError: the list of models is not to be had",
    ]  # fmt: skip
    lines = err.splitlines()
    assert lines[0].startswith("warning: slow of dbcap-slow takes 0.7 s to load")
    assert lines[1:] == [
        "failed: broken-command of dbcap-broken: ModuleNotFoundError: No module named 'a_module_that_is_not_there'",
        "failed: broken-hook of dbcap-broken: RuntimeError: the list of models is not to be had",
        "failed: broken-import of dbcap-broken: ModuleNotFoundError: No module named 'a_module_that_is_not_there'",
    ]


def test_json(cli, all_three, monkeypatch):
    monkeypatch.setenv("DBCAP_PLUGINS", "dbcap-good,slow")
    found = {(row["group"], row["name"]): row for row in json.loads(cli("plugins", "doctor", "--json").out)}
    assert found["dbcap.commands", "hello"]["status"] == "ok"
    assert found["dbcap.plugins", "slow"]["slow"] is True
    assert found["dbcap.plugins", "broken-hook"]["status"] == "disabled"


def test_what_is_disabled_is_not_wrong(cli, all_three, monkeypatch):
    monkeypatch.setenv("DBCAP_PLUGINS", "dbcap-good")
    code, _, err = cli("plugins", "doctor")
    assert code == 0
    assert err.endswith(" looked at, nothing is wrong\n")


def test_none_hides_them_all(process, all_three, monkeypatch):
    monkeypatch.setenv("DBCAP_PLUGINS", "none")
    assert "hello" not in process("--help").out
    result = process("hello")
    assert (result.code, result.error) == (2, "there is no command hello; `dbcap --help` lists them")
    code, out, _ = process("plugins", "list")
    assert code == 0
    assert {row.split("\t")[3] for row in out.splitlines()} == {"disabled"}


def test_help_and_list_import_no_plugin(cli, all_three):
    import sys

    assert cli("--help").code == 0
    code, out, _ = cli("plugins", "list")
    assert code == 0
    states = {row.split("\t")[0]: row.split("\t")[3] for row in out.splitlines()}
    assert states["slow"] == states["broken-hook"] == states["hello"] == "not loaded"
    assert not [name for name in sys.modules if name.startswith(("dbcap_good", "dbcap_broken", "dbcap_slow"))]


def test_no_plugins_at_all(cli, monkeypatch):
    from dbcap.plugins import loader

    monkeypatch.setattr("importlib.metadata.distributions", list)
    loader.reset()
    assert cli("plugins", "list") == (0, "", "no plugins are installed\n")
    assert json.loads(cli("plugins", "list", "--json").out) == []


def test_a_plugin_cannot_take_a_commands_name(process, plugins, tmp_path):
    info = tmp_path / "thief" / "dbcap_thief-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dbcap-thief\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dbcap.commands]\nconfig = os:getcwd\n")
    plugins(tmp_path / "thief")
    assert process("config", "path").out == f"{os.environ['DBCAP_HOME']}/config.toml\n"
    result = process("plugins", "doctor")
    assert result.code == 1
    assert "config of dbcap-thief: dbcap itself has a command of this name" in result.err
