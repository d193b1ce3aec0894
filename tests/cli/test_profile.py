"""`dbcap profile`, and `--profile` on any command."""

from __future__ import annotations

import json

import pytest

from dbcap.config import paths
from dbcap.config.profiles import BUILTIN

STARTER = BUILTIN["starter"]


def test_the_life_of_a_profile(cli):
    file = paths.profiles_dir() / "fast.toml"
    assert cli("profile", "create", "fast", "caption.num-beams=1", "caption.prefix=a=b") == (
        0,
        "",
        f"profile fast: {file}\n",
    )
    assert file.read_text() == (
        '# Settings of the profile fast: dbcap ... --profile fast\n\n[caption]\nnum_beams = 1\nprefix = "a=b"\n'
    )
    assert cli("profile", "list").out == f"starter\t\tcomes with dbcap\nfast\t\t{file}\n"
    assert cli("profile", "show", "fast").out == 'caption.num_beams = 1\ncaption.prefix = "a=b"\n'
    assert cli("config", "get", "caption.num_beams", "--profile", "fast").out == "1\n"
    assert cli("profile", "use", "fast").err == "the active profile is fast\n"
    assert cli("profile", "list").out == f"starter\t\tcomes with dbcap\nfast\tactive\t{file}\n"
    assert cli("config", "get", "caption.num_beams").out == "1\n"
    assert cli("profile", "delete", "fast").err == "profile fast is deleted\n"
    assert cli("profile", "list").out == "starter\t\tcomes with dbcap\n"
    assert cli("config", "get", "caption.num_beams") == (0, "\n", "")


def test_json(cli):
    cli("profile", "use", "starter")
    assert json.loads(cli("profile", "list", "--json").out) == [{"name": "starter", "active": True, "path": None}]
    shown = json.loads(cli("profile", "show", "starter", "--json").out)
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in shown.items()} == STARTER


def test_a_profile_from_another(cli):
    assert cli("profile", "create", "mine", "--from", "starter", "quiet=true").code == 0
    lines = cli("profile", "show", "mine").out.splitlines()
    assert lines[0] == "quiet = true"
    assert lines[1:] == cli("profile", "show", "starter").out.splitlines()
    assert 'caption.model = "starter"' in lines


def test_use_none(cli):
    cli("profile", "use", "starter")
    assert cli("config", "get", "caption.model").out == "starter\n"
    assert cli("profile", "use", "--none").err == "no profile is active\n"
    assert cli("config", "get", "caption.model").out == "nlpconnect/vit-gpt2-image-captioning\n"


def test_the_variable_names_a_profile(cli, monkeypatch):
    monkeypatch.setenv("DBCAP_PROFILE", "starter")
    assert cli("config", "get", "caption.model").out == "starter\n"
    monkeypatch.setenv("DBCAP_PROFILE", "startre")
    assert cli("config", "get", "caption.model").error == "there is no profile startre; did you mean starter?"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "../evil"], "'../evil' is no profile name; use letters"),
        (["create", "starter"], "there is a profile starter already"),
        (["create", "x", "quiet"], "'quiet' is not of the form KEY=VALUE; for example caption.num_beams=4"),
        (["create", "x", "quite=true"], "profile create: there is no key quite; did you mean quiet?"),
        (["create", "x", "quiet=maybe"], "profile create: quiet = 'maybe' is not allowed: it must be true or false"),
        (["create", "x", "--from", "startre"], "there is no profile startre; did you mean starter?"),
        (["show", "startre"], "there is no profile startre; did you mean starter?"),
        (["show", "zzz"], "there is no profile zzz; the profiles are starter"),
        (["use"], "name a profile, or say --none"),
        (["use", "starter", "--none"], "name a profile, or say --none"),
        (["use", "zzz"], "there is no profile zzz"),
        (["delete", "starter"], "the profile starter comes with dbcap and stays"),
        (["delete", "startre"], "there is no profile startre; did you mean starter?"),
    ],
)
def test_mistakes_are_one_line_with_code_2(cli, words, message):
    result = cli("profile", *words)
    assert result.code == 2
    assert message in result.error
    assert not (paths.profiles_dir() / "x.toml").exists()


def test_an_active_profile_whose_file_is_gone_can_be_replaced(cli):
    cli("profile", "create", "fast")
    cli("profile", "use", "fast")
    (paths.profiles_dir() / "fast.toml").unlink()
    result = cli("config", "show")
    assert (result.code, result.error) == (
        2,
        f"there is no profile fast, which {paths.config_file()} makes active; "
        "`dbcap profile use --none` makes none active",
    )
    assert cli("profile", "use", "--none").code == 0
    assert cli("config", "show").code == 0


def test_a_broken_profile_can_be_deleted(cli):
    cli("profile", "create", "fast")
    cli("profile", "use", "fast")
    (paths.profiles_dir() / "fast.toml").write_text("broken")
    assert cli("config", "show").code == 2
    assert cli("profile", "delete", "fast").code == 0
    assert cli("config", "show").code == 0
