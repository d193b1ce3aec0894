"""From a configuration model to a command: options, settings, report, exit code."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass

import pytest
import typer

from dbcap.cli import command as module
from dbcap.cli.command import Session, command, mending, options_of, plain
from dbcap.cli.help import App
from dbcap.config import fields
from dbcap.config.models import CaptionConfig, CommonConfig
from dbcap.errors import DbcapError, Interrupted


@dataclass(frozen=True)
class Outcome:
    """The report of a command that does nothing."""

    exit_code: int = 0
    summary: str = ""


@pytest.fixture
def captioned(project, capsys, monkeypatch):
    """Return a function that runs a command of `CaptionConfig`: what it got, the exit code and stderr."""
    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def call(*words, outcome=Outcome(), work=None):
        got = {}

        def caption(config, common, events):
            """Do nothing."""
            got.update(config=config, common=common, events=events)
            if work:
                work(events)
            return outcome

        app = App()
        app.command()(command(CaptionConfig)(caption))
        code = typer.main.get_command(app)(list(words), standalone_mode=False)
        out, err = capsys.readouterr()
        assert out == ""
        return got, code or 0, err

    return call


def test_options_become_the_frozen_model(captioned):
    got, code, err = captioned(
        "a b.jpg", "-", "@list", "-r", "--num-beams", "4", "--no-progress", "-h", "--replace", "a=b", "--replace", "c=d"
    )
    assert (code, err) == (0, "")
    assert got["config"] == CaptionConfig(
        inputs=("a b.jpg", "-", "@list"), recursive=True, num_beams=4, with_filename=False, replace=("a=b", "c=d")
    )
    assert got["common"] == CommonConfig(progress=False)


def test_without_options_the_defaults_hold(captioned):
    got, _, _ = captioned("x")
    assert got["config"] == CaptionConfig(inputs=("x",))
    assert got["common"] == CommonConfig()


def test_a_negative_option_beats_a_weaker_yes(captioned, monkeypatch):
    monkeypatch.setenv("DBCAP_CAPTION__RECURSIVE", "true")
    monkeypatch.setenv("DBCAP_CAPTION__WITH_FILENAME", "true")
    assert captioned("x")[0]["config"].recursive is True
    got, _, _ = captioned("x", "--no-recursive", "--no-filename")
    assert (got["config"].recursive, got["config"].with_filename) == (False, False)


def test_the_summary_is_said_and_the_exit_code_handed_on(captioned):
    assert captioned("x", outcome=Outcome(3, "2 failed"))[1:] == (3, "2 failed\n")
    assert captioned("x", "--quiet", outcome=Outcome(5, "more to do"))[1:] == (5, "")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DbcapError("what", "next"), 1, "error: what; next\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (Interrupted(143), 143, "error: terminated\n"),
        (
            ZeroDivisionError("x"),
            1,
            "error: ZeroDivisionError: x; this is a fault in dbcap, and DBCAP_DEBUG=1 shows where",
        ),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_errors_of_the_work_are_explained(captioned, monkeypatch, error, code, line):
    monkeypatch.setattr("dbcap.cli.output.close_stdout", lambda: None)

    def work(_events):
        raise error

    _, found, err = captioned("x", work=work)
    assert found == code
    assert err.startswith(line)


def test_errors_are_in_the_log_too(captioned, project):
    def work(events):
        events.detail("because")
        raise DbcapError("what")

    _, code, err = captioned("x", "--quiet", "--log-file", "run.log", work=work)
    assert (code, err) == (1, "error: what\n")
    assert [line.split(" ", 1)[1] for line in (project / "run.log").read_text().splitlines()] == [
        "because",
        "error: what",
    ]


def test_offline_is_told_to_the_hub_library(captioned):
    captioned("x")
    assert "HF_HUB_OFFLINE" not in os.environ
    captioned("x", "--offline")
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_problems_with_plugins_are_warned_about_after_the_work(captioned, plugins):
    from dbcap.plugins import loader

    plugins("broken", "good")
    _, code, err = captioned("x", work=lambda _: loader.models(), outcome=Outcome(0, "done"))
    assert code == 0
    lines = err.splitlines()
    assert lines[0] == "done"
    assert sorted(lines[1:]) == [
        "warning: the plugin broken-hook of dbcap-broken 1.0 is not used: "
        "RuntimeError: the list of models is not to be had",
        "warning: the plugin broken-import of dbcap-broken 1.0 is not used: "
        "ModuleNotFoundError: No module named 'a_module_that_is_not_there'",
    ]


# ---- options


def test_every_field_is_an_option_that_says_all_it_must(cli):
    text = " ".join(cli("caption", "--help").out.split())
    for known in (CaptionConfig, CommonConfig):
        for name, field in known.model_fields.items():
            cli_facts = fields.cli_of(field)
            assert field.description in text, name
            if cli_facts.argument:
                continue
            flag = fields.flag_of(name)
            assert flag in text or f"--[no-]{flag[2:]}" in text, name
            for own in (part for flags in cli_facts.flags for part in flags.split("/")):
                assert f"{own}," in text or f"{own} " in text, own
            assert all(choice in text for choice in fields.choices(field))
            if default := fields.default_text(field):
                assert f"(default {default})" in text.replace("- ", "-"), name


def test_own_options_come_before_inherited_ones():
    names = [parameter.name for parameter in options_of(CaptionConfig)]
    assert names[0] == "inputs"
    assert names[-4:] == ["device", "dtype", "batch_size", "compile"]
    assert sorted(names) == sorted(CaptionConfig.model_fields)


def test_options_are_not_given_by_default():
    assert {p.default for p in options_of(CaptionConfig) if p.name != "inputs"} == {None}


def test_help_is_80_columns_wide_whatever_the_terminal(cli, monkeypatch):
    for columns in ("80", "300"):
        monkeypatch.setenv("COLUMNS", columns)
        out = cli("caption", "--help").out
        assert max(map(len, out.splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, cli("profile", "create", "--help").out.splitlines())) <= 60


def test_the_help_keeps_the_lines_of_examples(cli):
    assert "\n    dbcap caption photo.jpg\n    dbcap caption photos -r" in cli("caption", "--help").out


# ---- plain commands


def test_a_plain_command_gets_its_session_and_own_parameters(project, capsys):
    got = {}

    @plain
    def work(session: Session, word: str, loud: bool = False) -> None:
        """Work."""
        got.update(session=session, word=word, loud=loud)

    app = App()
    app.command()(work)
    typer.main.get_command(app)(["x", "--loud", "--quiet", "--set", "caption.seed=5"], standalone_mode=False)
    assert (got["word"], got["loud"]) == ("x", True)
    assert got["session"].common == CommonConfig(quiet=True)
    assert got["session"].settings.values["caption.seed"] == 5
    assert "session" not in inspect.signature(work).parameters


@pytest.mark.parametrize(("kind", "code"), [(plain, 2), (mending, 0)])
def test_a_mending_command_runs_in_spite_of_broken_settings(project, capsys, kind, code):
    (project / "dbcap.toml").write_text("broken")
    app = App()

    def work(session: Session) -> None:
        assert session.common.quiet

    app.command()(kind(work))
    assert (typer.main.get_command(app)(["--quiet"], standalone_mode=False) or 0) == code


def test_a_mending_command_still_checks_what_was_typed(project, capsys):
    app = App()

    def work(session: Session) -> None:
        pytest.fail("must not run")

    app.command()(mending(work))
    assert typer.main.get_command(app)(["--set", "quiet=maybe"], standalone_mode=False) == 2
    assert "--set quiet=maybe" in capsys.readouterr().err


def test_tokenizers_are_kept_from_warning_of_forks(captioned, monkeypatch):
    captioned("x")
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    captioned("x")
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_the_module_of_commands_does_not_know_any_command():
    assert "dbcap.captioning" not in inspect.getsource(module)


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_do_not_spin_for_long_unless_the_user_says_so(captioned, monkeypatch, given, spins):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    captioned("photo.jpg")
    assert os.environ.get("GOMP_SPINCOUNT") == spins
