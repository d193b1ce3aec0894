"""stdout is data, stderr is talk; what each of them shows on a terminal, in a pipe and in the log."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from dbcap.cli.output import Terminal, print_json, print_lines, print_table, printable
from dbcap.errors import ConfigError

TALK = """
import sys, time
from dbcap.cli.output import Terminal
terminal = Terminal(progress="--no-progress" not in sys.argv, quiet="--quiet" in sys.argv)
terminal.say("said")
terminal.warn("warned")
terminal.error("erred")
with terminal.track("Captioning", 2) as tracker:
    time.sleep(0.2)
    terminal.fail("[b]x.jpg[/b] is\\nbroken")
    tracker.fail()
    tracker.advance()
    tracker.note("loss [b]0.5")
    time.sleep(0.2)
with terminal.track("Downloading", None, "bytes") as tracker:
    tracker.advance(1000)
terminal.say("done")
"""
ESCAPE = "\x1b"


# ---- a pipe


@pytest.fixture
def talk(home, capsys):
    def call(**options):
        terminal = Terminal(**options)
        terminal.say("said")
        terminal.detail("detail")
        terminal.warn("warned")
        terminal.fail("failed it")
        terminal.error("erred")
        with terminal.track("Captioning", 2) as tracker:
            tracker.advance()
            tracker.fail(1)
        out, err = capsys.readouterr()
        assert out == ""
        return err.splitlines()

    return call


def test_who_says_what(talk):
    assert talk() == ["said", "warning: warned", "failed: failed it", "error: erred"]
    assert talk(verbose=True) == ["said", "detail", "warning: warned", "failed: failed it", "error: erred"]
    assert talk(quiet=True) == ["failed: failed it", "error: erred"]
    assert talk(quiet=True, verbose=True) == ["detail", "failed: failed it", "error: erred"]


def test_the_log_holds_everything_with_times_and_is_appended_to(talk, tmp_path):
    log = tmp_path / "run.log"
    for _ in range(2):
        talk(quiet=True, log_file=str(log))
    stamps, lines = zip(*(line.split(" ", 1) for line in log.read_text().splitlines()), strict=True)
    assert list(lines) == 2 * ["said", "detail", "warning: warned", "failed: failed it", "error: erred"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", stamp) for stamp in stamps)


def test_a_log_that_cannot_be_written_is_named(home, tmp_path):
    with pytest.raises(ConfigError, match=f"cannot write --log-file {tmp_path}: Is a directory"):
        Terminal(log_file=str(tmp_path))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\udcff.jpg", r"\udcff.jpg"),
        ("grün 写真 🐟", "grün 写真 🐟"),
        ("a\u202eb\u2028c", r"a\u202eb\u2028c"),
        ("it's [bold]", "it's [bold]"),
    ],
)
def test_messages_are_one_printable_line(text, shown):
    assert printable(text) == shown


def test_lines_and_json_are_utf8_bytes(home, capsysbinary):
    print_lines(["grün", "a\udcffb"])
    print_json({"ü": "\n"})
    out = capsysbinary.readouterr().out
    assert out == "grün\n".encode() + b"a\xffb\n" + '{\n  "ü": "\\n"\n}\n'.encode()
    assert json.loads(out.split(b"\n", 2)[2]) == {"ü": "\n"}


def test_a_table_in_a_pipe_is_separated_by_tabs(home, capsys):
    print_table("Title", ("a", "b"), [("x y", "1"), ("tab\there", "")])
    assert capsys.readouterr().out == "x y\t1\ntab\\there\t\n"


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_stdout_is_utf8_whatever_the_locale(process, locale):
    process("config", "set", "caption.prefix", "grün 写真", env=locale)
    result = process("config", "get", "caption.prefix", env=locale)
    assert (result.code, result.out, result.err) == (0, "grün 写真\n", "")
    assert process("config", "get", "caption.prefi\u00fc", env=locale).error


COLUMNS = ("file", "size", "ms")
ROWS = [(f"{24 * 'long-'}[b].onnx", "20.1 MB", "100"), ("short\x1b", "1.2 MB", "12345")]


def test_a_table_of_the_talk_is_as_wide_as_it_needs_where_there_is_no_terminal(home, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "20")
    log = tmp_path / "log"
    Terminal(log_file=str(log)).table(COLUMNS, ROWS, right=("size", "ms"))
    lines = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().err.splitlines()[2:]]
    assert lines == [list(ROWS[0]), ["short\\x1b", "1.2 MB", "12345"]]
    logged = log.read_text().splitlines()
    assert [[cell.strip() for cell in line[20:].split("│")] for line in logged[2:]] == lines
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d ", line) for line in logged)


def test_quiet_means_no_table_but_in_the_log(home, capsys, tmp_path):
    Terminal(quiet=True, log_file=str(tmp_path / "log")).table(COLUMNS, ROWS)
    assert capsys.readouterr().err == ""
    assert "20.1 MB" in (tmp_path / "log").read_text()


# ---- a terminal


def test_a_terminal_gets_colours_and_progress(on_terminal):
    code, shown = on_terminal("-c", TALK, env={"NO_COLOR": ""})
    assert code == 0
    assert f"{ESCAPE}[33mwarning: warned{ESCAPE}[0m\n" in shown
    assert f"{ESCAPE}[1;31merror: erred{ESCAPE}[0m\n" in shown
    assert re.search(r"Captioning .*1 failed", shown.replace("\n", " "))
    assert "loss [b]0.5" in shown
    assert "2/2" in shown
    assert f"failed: [b]x.jpg[/b] is\\nbroken{ESCAPE}[0m\n" in shown
    assert shown.endswith("done\n")


def test_no_color_means_no_escape_codes(on_terminal):
    code, shown = on_terminal("-c", TALK, "--no-progress", env={"NO_COLOR": "1"})
    assert (code, shown) == (
        0,
        "said\nwarning: warned\nerror: erred\nfailed: [b]x.jpg[/b] is\\nbroken\ndone\n",
    )


def test_no_color_leaves_progress_its_movements_but_no_colour(on_terminal):
    _, shown = on_terminal("-c", TALK, env={"NO_COLOR": "1"})
    assert "Captioning" in shown
    assert not re.search(ESCAPE + r"\[[0-9;]*m", shown)


@pytest.mark.parametrize("words", [["--no-progress"], ["--quiet"]])
def test_progress_can_be_switched_off(on_terminal, words):
    _, shown = on_terminal("-c", TALK, *words, env={"NO_COLOR": ""})
    assert "Captioning" not in shown
    assert "erred" in shown


def test_there_is_no_progress_in_a_pipe(project):
    done = subprocess.run([sys.executable, "-c", TALK], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "said\nwarning: warned\nerror: erred\nfailed: [b]x.jpg[/b] is\\nbroken\ndone\n"


def test_long_lines_are_not_broken_on_a_terminal(on_terminal):
    line = "word " * 60
    _, shown = on_terminal(
        "-c", f"from dbcap.cli.output import Terminal\nTerminal().say({line!r})", env={"COLUMNS": "40"}
    )
    assert shown == line + "\n"


@pytest.mark.parametrize("words", [["--help"], ["caption", "--help"], ["profile", "list"], ["config", "get", "zzz"]])
def test_with_no_color_the_commands_print_no_escape_codes(on_terminal, words):
    _, shown = on_terminal("-m", "dbcap", *words, env={"NO_COLOR": "1"})
    assert shown
    assert ESCAPE not in shown


def test_a_table_on_a_terminal_has_a_title_and_columns(on_terminal):
    code, shown = on_terminal("-m", "dbcap", "profile", "list", env={"NO_COLOR": "1", "COLUMNS": "80"})
    assert code == 0
    assert [line.split() for line in shown.splitlines() if "starter" in line] == [
        ["starter", "│", "│", "comes", "with", "dbcap"]
    ]
    assert "Profiles" in shown


@pytest.mark.parametrize("script", ["Terminal().table(COLUMNS, ROWS)", "print_table('', COLUMNS, ROWS)"])
@pytest.mark.parametrize("width", ["30", "60"])
def test_a_table_is_folded_on_a_narrow_terminal_and_never_cut(on_terminal, script, width):
    begin = f"from dbcap.cli.output import *\nCOLUMNS, ROWS = {COLUMNS!r}, {ROWS!r}\n"
    code, shown = on_terminal("-c", begin + script, env={"NO_COLOR": "1", "COLUMNS": width})
    assert code == 0
    assert "…" not in shown
    assert all(len(line) <= int(width) for line in shown.splitlines())
    cells = [line.split("│") for line in shown.splitlines() if "│" in line]
    assert "".join(row[0].strip() for row in cells) == ROWS[0][0] + "short\\x1b"
    assert [row[2].strip() for row in cells if row[2].strip()] == ["100", "12345"]
