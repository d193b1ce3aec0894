"""The program as the shell sees it: what it loads, how it starts, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

import dbcap
from dbcap.cli.app import COMMANDS

HEAVY = {"torch", "transformers", "diffusers", "huggingface_hub", "numpy", "PIL", "lightning", "onnxruntime"}
FAILED = "the plugin command act of dbcap-acts failed"
LOADED = """
import sys
from dbcap.cli.app import run
code = run(sys.argv[1:])
sys.stdout.flush()
print(code, *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def loaded(*words: str, env: dict[str, str] | None = None) -> tuple[int, set[str]]:
    """Run a command line in a fresh process; return the exit code and the packages that are loaded at its end."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *words], capture_output=True, text=True, env={**os.environ, **(env or {})}
    )
    code, *names = done.stderr.splitlines()[-1].split()
    return int(code), set(names)


# ---- start


@pytest.mark.parametrize("words", [("--version",), ("--help",)])
def test_version_and_help_load_next_to_nothing(project, words):
    code, packages = loaded(*words)
    assert code == 0
    assert not packages & (HEAVY | {"pydantic_settings", "pydantic", "rich", "tomlkit", "yaml"})


@pytest.mark.parametrize("words", [("config", "show"), ("caption", "--help"), ("caption", "--no-such-option")])
def test_nothing_but_work_loads_torch(project, words):
    code, packages = loaded(*words)
    assert code == (2 if "--no-such-option" in words else 0)
    assert not packages & HEAVY


def test_completion_loads_neither_torch_nor_plugins(project, plugins):
    plugins("good", "broken", "slow")
    env = {"_DBCAP_COMPLETE": "complete_bash", "COMP_WORDS": "dbcap config get cap", "COMP_CWORD": "3"}
    code, packages = loaded(env=env)
    assert code == 0
    assert not packages & (HEAVY | {"pydantic_settings", "dbcap_good", "dbcap_broken", "dbcap_slow"})


def test_every_module_can_be_imported_first(project):
    """One process for all; before each import those that came before are forgotten."""
    root = Path(dbcap.__file__).parent
    names = [".".join(("dbcap", *path.relative_to(root).with_suffix("").parts)) for path in sorted(root.rglob("*.py"))]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    script = """
import importlib, sys
for name in sys.argv[1:]:
    for known in [known for known in sys.modules if known.partition(".")[0] == "dbcap"]:
        del sys.modules[known]
    try:
        importlib.import_module(name)
    except Exception as error:
        print(name, type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_version(cli):
    assert cli("--version") == (0, f"dbcap {dbcap.__version__}\n", "")
    assert metadata.version("dbcap") == dbcap.__version__


def test_the_console_script_and_the_module_are_the_same(project):
    (point,) = metadata.entry_points(group="console_scripts", name="dbcap")
    assert point.value == "dbcap.__main__:main"
    script = Path(sys.executable).parent / "dbcap"
    outputs = [
        subprocess.run([*start, "config", "get", "zzz"], capture_output=True)
        for start in ([sys.executable, "-m", "dbcap"], [script])
    ]
    assert outputs[0].returncode == outputs[1].returncode == 2
    assert outputs[0].stderr == outputs[1].stderr != b""


# ---- help


def test_the_help_lists_every_command_with_its_line(cli):
    code, out, err = cli("--help")
    assert (code, err) == (0, "")
    for name, command in COMMANDS.items():
        assert f"  {name:8}  {command.help}\n" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_in_the_list_is_how_the_commands_own_help_begins(cli, name):
    code, out, _ = cli(name, "--help")
    assert code == 0
    assert out.startswith(f"Usage: dbcap {name} [OPTIONS]")
    assert COMMANDS[name].help.removesuffix(".") in " ".join(out.split())


@pytest.mark.parametrize("words", [(), ("config",), ("profile",), ("runs",), ("models",), ("cache",), ("plugins",)])
def test_without_a_command_the_help_is_shown_on_stderr_and_the_code_is_2(cli, words):
    assert cli(*words) == (2, "", cli(*words, "--help").out)


# ---- usage errors: one line, with what was probably meant


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["capton", "x"], "there is no command capton; did you mean caption?"),
        (["zzz"], "there is no command zzz; `dbcap --help` lists them"),
        (["conf\nig\x1b[31m"], r"there is no command conf\nig\x1b[31m; did you mean config?"),
        (["--verison"], "dbcap: no such option: --verison; did you mean --version?"),
        (["--quiet", "caption", "x"], "options come after the command, as in `dbcap caption --quiet`"),
        (["config", "gett"], "dbcap config: no such command 'gett'. Did you mean 'get'?"),
        (["config", "get"], "dbcap config get: missing argument 'KEY'; `dbcap config get --help` shows"),
        (["config", "get", "a", "b"], "dbcap config get: got unexpected extra argument(s) (b); `dbcap config get"),
        (["config", "show", "--orign"], "dbcap config show: no such option: --orign; did you mean --origin?"),
        (["caption"], "dbcap caption: missing argument 'INPUT'; `dbcap caption --help` shows what it takes"),
        (["caption", "x", "--num-beems", "4"], "no such option: --num-beems; did you mean --num-beams?"),
        (["caption", "x", "-Z"], "dbcap caption: no such option: -Z; `dbcap caption --help` shows what it takes"),
        (["caption", "x", "--num-beams"], "option '--num-beams' requires an argument"),
        (["caption", "x", "--quiet=3"], "option '--quiet' does not take a value"),
        (["caption", "x", "--dtype", "float23"], "--dtype: 'float23' is not allowed: it must be one of auto, float32"),
        (["caption", "x", "--top-p", "0.5"], "--top-p needs --sample"),
        (["caption", "x", "--set", "seed"], "--set 'seed' is not of the form KEY=VALUE; for example --set"),
        (["caption", "x", "--set", "sead=3"], "--set sead=3: there is no key sead; did you mean caption.seed?"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(cli, words, message):
    result = cli(*words)
    assert result.code == 2
    assert message in result.error


# ---- how commands end


@pytest.mark.parametrize(
    ("how", "code", "line"),
    [
        ("value", 0, ""),
        ("true", 0, ""),
        ("exit", 3, ""),
        ("code", 4, ""),
        ("leave", 1, r"error: left\nearly"),
        ("abort", 1, "error: aborted"),
        ("input", 1, "error: bad input; try another"),
        ("usage", 2, "error: dbcap act: invalid value: not this one; `dbcap act --help` shows what it takes"),
        ("file", 1, r"error: /no/such\nfile: No such file or directory"),
        ("fault", 1, rf"error: {FAILED}: ZeroDivisionError: by\nzero; DBCAP_DEBUG=1 shows where"),
        ("empty", 1, f"error: {FAILED}: ValueError; DBCAP_DEBUG=1 shows where"),
    ],
)
def test_every_end_of_a_command_has_its_code_and_at_most_one_line(cli, acts, how, code, line):
    result = cli("act", how)
    assert (result.code, result.out, result.err.rstrip("\n")) == (code, "", line)


def test_debug_shows_where_it_happened(process, acts, monkeypatch):
    monkeypatch.setenv("DBCAP_DEBUG", "1")
    result = process("act", "fault")
    assert result.code == 1
    assert "Traceback" in result.err
    assert 'raise ZeroDivisionError("by\\nzero")' in result.err
    monkeypatch.setenv("DBCAP_DEBUG", "0")
    assert "Traceback" not in process("act", "fault").err


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGINT, 130, ""), (signal.SIGTERM, 143, "terminated")])
def test_a_signal_ends_a_plugins_command(project, acts, number, code, word):
    child = subprocess.Popen(
        [sys.executable, "-m", "dbcap", "act", "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(project / "ready")
    child.send_signal(number)
    out, err = child.communicate(timeout=20)
    assert (child.returncode, out, err) == (code, "", f"error: {word}\n" if word else err)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated"), (signal.SIGHUP, "the terminal was closed")],
)
def test_a_signal_ends_a_command_of_ours(project, monkeypatch, number, words):
    editor = project / "editor"
    editor.write_text("#!/bin/sh\ntouch ready\nexec sleep 30\n")
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(editor))
    child = subprocess.Popen(
        [sys.executable, "-m", "dbcap", "config", "edit"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(project / "ready")
    child.send_signal(number)
    out, err = child.communicate(timeout=20)
    assert (child.returncode, out, err) == (128 + number, "", f"error: {words}\n")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.02)


def test_a_reader_that_goes_away_ends_us_quietly(bash, acts):
    result = bash(
        """
        dbcap config show | head -1; echo ${PIPESTATUS[@]}
        dbcap caption --help | head -1; echo ${PIPESTATUS[@]}
        dbcap --help | true; echo ${PIPESTATUS[@]}
        dbcap act print | head -1; echo ${PIPESTATUS[@]}
        dbcap config show --json 2>&1 | head -1; echo ${PIPESTATUS[@]}
        """
    )
    assert result.err == ""
    assert result.out.splitlines() == [
        "quiet = false", "0 0", "Usage: dbcap caption [OPTIONS] INPUT...", "0 0", "0 0", "0", "0 0", "{", "0 0",
    ]  # fmt: skip


def test_closed_and_full_streams_are_no_fault_of_ours(bash):
    result = bash(
        """
        dbcap config show >&-; echo $?
        dbcap config show > /dev/full; echo $?
        dbcap --help > /dev/full; echo $?
        dbcap config get zzz 2>&-; echo $?
        dbcap config get quiet 2>&- <&-; echo $?
        """
    )
    assert result.out.split() == ["1", "1", "1", "2", "false", "0"]
    assert result.err.splitlines() == [
        "error: stdout is closed; send it to a file or to /dev/null",
        "error: cannot write to stdout: No space left on device; make room, or send it elsewhere",
        "error: No space left on device",
    ]


def test_a_stderr_that_is_full_does_not_change_the_exit_code(bash):
    assert bash("dbcap config get zzz 2>/dev/full; echo $?").out == "2\n"


def test_a_log_is_not_added_to_what_is_no_text(cli, tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    result = cli("config", "show", "--log-file", str(picture))
    assert (result.code, result.out) == (2, "")
    assert "is no text file" in result.err
    assert picture.read_bytes() == b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


def test_in_a_deleted_folder_settings_work_and_captions_say_why_not(bash):
    result = bash("mkdir d; cd d; rmdir ../d; dbcap config get caption.seed; dbcap caption x.png; echo $?")
    assert result.out == "0\n2\n"
    errors = [line for line in result.err.splitlines() if not line.startswith("sh: ")]  # the shell complains itself
    assert errors == ["error: the current folder does not exist any more; change to another"]


# ---- completion


@pytest.fixture
def complete(cli, monkeypatch):
    def call(line: str) -> list[str]:
        words = line.split(" ")
        monkeypatch.setenv("_DBCAP_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        result = cli()
        assert (result.code, result.err) == (0, "")
        return result.out.split()

    return call


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("dbcap ca", ["caption", "cache"]),
        ("dbcap config s", ["show", "set"]),
        ("dbcap caption --num", ["--num-beams", "--num-captions"]),
        ("dbcap caption --no-prog", ["--no-progress"]),
        ("dbcap caption --dtype b", ["bfloat16"]),
        ("dbcap caption --existing ", ["skip", "overwrite", "append", "prepend", "error"]),
        ("dbcap config get caption.num", ["caption.num_beams", "caption.num_captions"]),
        ("dbcap config set qu", ["quiet"]),
        ("dbcap config set caption.dtype ", ["auto", "float32", "bfloat16", "float16"]),
        ("dbcap config set caption.zzz ", []),
        ("dbcap caption --set qu", ["quiet="]),
        ("dbcap caption --profile s", ["starter"]),
        ("dbcap profile use s", ["starter"]),
        ("dbcap profile create x --from s", ["starter"]),
        ("dbcap capton --fo", []),
    ],
)
def test_the_shell_offers(complete, line, offered):
    assert complete(line) == offered


def test_the_shell_offers_own_profiles_and_plugin_commands(complete, cli, plugins):
    cli("profile", "create", "slow")
    plugins("good", "broken")
    assert complete("dbcap caption --profile s") == ["starter", "slow"]
    assert complete("dbcap he") == ["hello"]
    assert complete("dbcap broken-command --x") == []


def test_completion_works_in_bash(bash):
    result = bash(
        """
        eval "$(dbcap --show-completion)"
        complete -p dbcap
        COMP_WORDS=(dbcap caption --dtype b) COMP_CWORD=3
        _dbcap_completion dbcap
        echo "${COMPREPLY[@]}"
        """
    )
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[0].endswith("-F _dbcap_completion dbcap")
    assert result.out.splitlines()[1] == "bfloat16"
