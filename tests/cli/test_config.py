"""`dbcap config`, with files of its own and an editor of its own."""

from __future__ import annotations

import json

import pytest

from dbcap.config import paths
from dbcap.config.layers import known_fields

SET = {  # place -> a key that only this place sets
    "command line": "caption.num_beams",
    "environment": "caption.seed",
    "--config": "caption.workers",
    "named": "caption.max_length",
    "project": "caption.min_length",
    "active": "caption.num_captions",
    "user": "caption.url_max_mb",
}


@pytest.fixture
def seven(project, monkeypatch):
    """One key set in each of the seven places; returns what has to be typed."""
    leaf = {place: key.partition(".")[2] for place, key in SET.items()}
    profiles = paths.profiles_dir()
    profiles.mkdir()
    monkeypatch.setenv("DBCAP_CAPTION__SEED", "7")
    (project / "run.yaml").write_text(f"caption:\n  {leaf['--config']}: 7\n")
    (profiles / "fast.toml").write_text(f"[caption]\n{leaf['named']} = 7\n")
    (project / "dbcap.toml").write_text(f"[caption]\n{leaf['project']} = 7\n")
    (profiles / "daily.toml").write_text(f"[caption]\n{leaf['active']} = 7\n")
    paths.config_file().write_text(f'profile = "daily"\n[caption]\n{leaf["user"]} = 7\n')
    return ["--set", "caption.num_beams=7", "--config", "run.yaml", "--profile", "fast"]


def test_show_origin_names_each_of_the_seven_places(process, project, seven):
    result = process("config", "show", "--origin", *seven)
    assert (result.code, result.err) == (0, "")
    places = {}
    for line in result.out.splitlines():
        setting, _, origin = line.partition("  # ")
        key, _, value = setting.partition(" =")
        places[key] = (value.strip(), origin)
    assert list(places) == list(known_fields())
    expected = {
        "command line": "command line",
        "environment": "environment DBCAP_CAPTION__SEED",
        "--config": "--config run.yaml",
        "named": "profile fast (named)",
        "project": str(project / "dbcap.toml"),
        "active": "profile daily (active)",
        "user": str(paths.config_file()),
    }
    assert {place: places[key] for place, key in SET.items()} == {
        place: ("7", origin) for place, origin in expected.items()
    }
    assert {origin for key, (_, origin) in places.items() if key not in SET.values()} == {"default"}


def test_a_misspelt_key_in_each_file_is_one_line_with_code_2(process, project, seven):
    """The same seven places, one after the other broken, in real processes."""
    files = {
        "run.yaml": "num_beems: 4",
        paths.profiles_dir() / "fast.toml": "num_beems = 4",
        project / "dbcap.toml": "[caption]\nnum_beems = 4",
        paths.profiles_dir() / "daily.toml": "num_beems = 4",
        paths.config_file(): "[captoin]\nnum_beams = 4",
    }
    for path, content in files.items():
        file = project / path
        before = file.read_text()
        file.write_text(content)
        result = process("config", "show", *seven)
        file.write_text(before)
        assert result.code == 2
        assert str(path) in result.error
        assert "there is no" in result.error
        assert "did you mean caption" in result.error
    result = process("config", "show", *seven, env={"DBCAP_CAPTION__NUM_BEEMS": "4"})
    assert result.error == (
        "environment: there is no variable DBCAP_CAPTION__NUM_BEEMS; did you mean DBCAP_CAPTION__NUM_BEAMS?"
    )
    assert process("config", "show", *seven).code == 0


def test_show(cli, project):
    (project / "dbcap.toml").write_text('[caption]\nprefix = "grün\\n"\nreplace = ["a=b"]\n')
    code, out, err = cli("config", "show")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == len(known_fields())
    assert "quiet = false" in lines
    assert "caption.num_beams =" in lines
    assert 'caption.prefix = "grün\\n"' in lines
    assert 'caption.replace = ["a=b"]' in lines


def test_show_json(cli, project):
    (project / "dbcap.toml").write_text('[caption]\nnum_beams = 4\nreplace = ["a=b"]\n')
    found = json.loads(cli("config", "show", "--json").out)
    assert list(found) == list(known_fields())
    assert (found["caption.num_beams"], found["caption.replace"], found["caption.prompt"]) == (4, ["a=b"], None)
    found = json.loads(cli("config", "show", "--json", "--origin").out)
    assert found["caption.num_beams"] == {"value": 4, "origin": str(project / "dbcap.toml")}


def test_get_says_what_is_in_force(cli, monkeypatch):
    assert cli("config", "get", "caption.num-beams") == (0, "\n", "")
    assert cli("config", "get", "caption.dtype") == (0, "auto\n", "")
    assert cli("config", "get", "progress") == (0, "true\n", "")
    monkeypatch.setenv("DBCAP_CAPTION__NUM_BEAMS", "4")
    assert cli("config", "get", "caption.num_beams") == (0, "4\n", "")
    result = cli("config", "get", "caption.num_beems")
    assert (result.code, result.error) == (
        2,
        "config get: there is no key caption.num_beems; did you mean caption.num_beams?",
    )
    assert "dbcap profile use" in cli("config", "get", "profile").error


def test_set_writes_the_users_file_and_unset_takes_it_back(cli):
    file = paths.config_file()
    assert cli("config", "set", "caption.num-beams", "4") == (0, "", f"caption.num_beams = 4 in {file}\n")
    assert file.read_text() == "[caption]\nnum_beams = 4\n"
    assert cli("config", "get", "caption.num_beams").out == "4\n"
    assert cli("config", "unset", "caption.num_beams").err == f"caption.num_beams is out of {file}\n"
    assert cli("config", "unset", "caption.num_beams").err == f"caption.num_beams was not in {file}\n"
    assert cli("config", "get", "caption.num_beams").out == "\n"


def test_project_means_the_file_beside_you(cli, project):
    assert cli("config", "set", "quiet", "true", "--project").code == 0
    assert (project / "dbcap.toml").read_text() == "quiet = true\n"
    assert not paths.config_file().exists()
    assert cli("config", "path", "--project").out == f"{project / 'dbcap.toml'}\n"
    assert cli("config", "path").out == f"{paths.config_file()}\n"
    assert cli("config", "unset", "quiet", "--project").code == 0
    assert (project / "dbcap.toml").read_text() == ""


def test_set_refuses_a_wrong_value_and_says_what_is_allowed(cli):
    result = cli("config", "set", "caption.dtype", "float23")
    assert result.code == 2
    assert result.error == (
        "config set: caption.dtype = 'float23' is not allowed: "
        "it must be one of auto, float32, bfloat16, float16; did you mean float32?"
    )
    assert not paths.config_file().exists()


def test_a_value_may_begin_with_a_dash(cli):
    assert cli("config", "set", "--", "caption.length_penalty", "-1.5").code == 0
    assert cli("config", "get", "caption.length_penalty").out == "-1.5\n"


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("[caption]\nnum_beams = 'x'\n", ["set", "caption.num_beams", "4"]),
        ("[caption]\nnum_beems = 4\n", ["unset", "caption.num_beems"]),
        ("profile = 'gone'\n", ["unset", "profile"]),
    ],
)
def test_a_mistake_in_the_file_can_be_put_right_by_command(cli, broken, words):
    paths.config_file().write_text(broken)
    assert cli("config", "show").code == 2
    assert cli("config", "path").code == 0
    assert cli("config", *words).code == 0
    assert cli("config", "show").code == 0


# ---- edit


@pytest.fixture
def editor(tmp_path, monkeypatch):
    """Return a function that makes an editor which writes `content` and ends with `code`."""

    def make(content: str | None, code: int = 0, variable: str = "EDITOR"):
        script = tmp_path / f"{variable} with space.sh"
        text = tmp_path / "text"
        text.write_text(content or "")
        copy = f'cat "{text}" > "$2"\n' if content is not None else ""
        script.write_text(f'#!/bin/sh\ncat "$2" > "{tmp_path}/seen"\ntest "$1" = --wait || exit 9\n{copy}exit {code}\n')
        script.chmod(0o755)
        monkeypatch.setenv(variable, f'"{script}" --wait')
        return tmp_path / "seen"

    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.delenv("EDITOR", raising=False)
    return make


def test_edit_opens_the_file_and_checks_it(cli, editor):
    seen = editor("quiet = true\n")
    assert cli("config", "edit") == (0, "", "")
    assert seen.read_text().startswith("# Settings of dbcap")
    assert cli("config", "get", "quiet").out == "true\n"


def test_edit_in_the_project(cli, editor, project):
    editor("verbose = true\n")
    assert cli("config", "edit", "--project").code == 0
    assert (project / "dbcap.toml").read_text() == "verbose = true\n"


def test_visual_goes_before_editor(cli, editor):
    editor(None, code=1)
    editor("quiet = true\n", variable="VISUAL")
    assert cli("config", "edit").code == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("quiet = true\nverbose = \n", "is not valid: Invalid value (at line 2, column 11)"),
        ("[caption]\nnum_beems = 4\n", "there is no key caption.num_beems; did you mean caption.num_beams?"),
        ("[caption]\ndtype = 'x'\n", "caption.dtype = 'x' is not allowed: it must be one of auto"),
    ],
)
def test_an_edit_that_breaks_the_file_is_told_with_line_or_key(cli, editor, content, message):
    editor(content)
    result = cli("config", "edit")
    assert result.code == 2
    assert result.error.startswith(str(paths.config_file()))
    assert message in result.error
    assert paths.config_file().read_text() == content  # nothing that was typed is lost


@pytest.mark.parametrize("broken", ["quiet = \n", "[captoin]\n", "profile = 'gone'\n"])
def test_a_file_that_is_broken_beforehand_can_be_edited(cli, editor, broken):
    paths.config_file().write_text(broken)
    seen = editor("quiet = true\n")
    assert cli("config", "edit").code == 0
    assert seen.read_text() == broken


def test_the_active_profile_may_stand_in_the_edited_file(cli, editor):
    editor('profile = "starter"\n')
    assert cli("config", "edit").code == 0


def test_an_editor_that_fails_or_is_missing_is_named(cli, editor, monkeypatch):
    editor(None, code=3)
    result = cli("config", "edit")
    assert result.code == 1
    assert "ended with exit code 3" in result.error
    monkeypatch.setenv("EDITOR", "/no/such/editor")
    assert cli("config", "edit").error == "cannot start /no/such/editor: No such file or directory"
    monkeypatch.delenv("EDITOR")
    assert "neither VISUAL nor EDITOR is set" in cli("config", "edit").error
