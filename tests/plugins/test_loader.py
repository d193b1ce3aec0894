"""The loader against real distributions: folders with modules and a dist-info, put on `sys.path`."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dbcap.errors import DbcapError, Interrupted
from dbcap.plugins import loader
from dbcap.plugins.api import API_VERSION
from dbcap.plugins.loader import PluginError

HERE = Path(__file__).parent


# ---- commands


def test_a_command_is_known_from_metadata_and_imported_when_loaded(add):
    add("good")
    entry = loader.commands([])["hello"]
    assert (entry.name, entry.distribution) == ("hello", "dbcap-good")
    assert "dbcap_good" not in sys.modules
    result = CliRunner().invoke(entry.load(), ["Ann"])
    assert (result.exit_code, result.output) == (0, "hello Ann\n")
    assert entry.load() is loader.commands([])["hello"].load()


def test_a_broken_command_raises_one_line_with_plugin_distribution_and_fault(add):
    add("good", "broken")
    entries = loader.commands([])
    for _ in range(2):
        with pytest.raises(PluginError) as caught:
            entries["broken-command"].load()
        text = str(caught.value)
        assert isinstance(caught.value, DbcapError)
        assert caught.value.exit_code == 1
        assert "\n" not in text
        for part in ("broken-command", "dbcap-broken 1.0", "ModuleNotFoundError", "a_module_that_is_not_there"):
            assert part in text
        assert "dbcap plugins doctor" in caught.value.hint
        assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    assert isinstance(entries["hello"].load(), typer.Typer)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise SystemExit", "SystemExit"),
        ("it = 5", "expected a typer.Typer, found an object of type int"),
        ("other = 5", "no attribute 'it'"),
        ("def", "SyntaxError"),
        ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", "E: (its message cannot be read)"),
        ("raise ValueError('one\\n  two\\nthree')", "ValueError: one two three"),
    ],
)
def test_whatever_a_command_does_when_imported_it_fails_alone(make, source, fault, report):
    make("bad", source, group="commands")
    with pytest.raises(PluginError) as caught:
        loader.commands([])["bad"].load()
    assert fault in caught.value.message
    assert report("bad", deep=False).status == "failed"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Interrupted])
def test_a_signal_while_a_plugin_loads_is_no_fault_of_the_plugin(make, stop, report):
    make("quick", f"from dbcap.errors import Interrupted\nraise {stop.__name__}", group="commands")
    with pytest.raises(stop):
        loader.commands([])["quick"].load()
    assert report("quick", deep=False).status == "ok"


def test_a_command_cannot_shadow_a_built_in(add, report):
    add("good")
    assert "hello" not in loader.commands({"hello", "caption"})
    found = report("hello", deep=True)
    assert (found.status, found.error) == ("shadowed", "dbcap itself has a command of this name")
    assert "dbcap_good.hello" not in sys.modules


@pytest.mark.parametrize("order", [("aaa", "zzz"), ("zzz", "aaa")])
def test_of_two_commands_with_one_name_the_first_distribution_wins_wherever_it_lies(make, monkeypatch, order):
    for distribution in order:
        make(distribution, "import typer\nit = typer.Typer()", group="commands", name="same")
    assert loader.commands([])["same"].distribution == "aaa"
    found = [one for one in loader.reports(deep=True) if one.name == "same"]
    assert [(one.distribution, one.status) for one in found] == [("aaa", "ok"), ("zzz", "shadowed")]
    assert "aaa 2.5" in found[1].error
    monkeypatch.setenv(loader.SWITCH, "zzz")
    loader.reset()
    assert loader.commands([])["same"].distribution == "zzz"


# ---- plugins and hooks


def test_the_good_plugin_gives_its_model_and_its_writer(add, report):
    add("good")
    (model,) = [model for model in loader.models() if model.name == "good-tiny"]
    assert (model.kind, model.licence) == ("captioner", "MIT")
    assert (model.folder / "config.json").is_file()
    assert loader.writers()["upper"]().header() == b""
    assert loader.captioners() == {}
    assert loader.problems() == []
    assert report("good", deep=True).status == "ok"


@pytest.mark.parametrize(
    "source",
    [
        "it = P()",
        "it = P",
        "def it(): return P()",
    ],
)
def test_an_object_a_class_and_a_factory_will_do(make, source):
    make("forms", "class P(Plugin):\n    def writers(self): return {'w': list}\n" + source)
    assert loader.writers()["w"] is list


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("it = 'text'", "expected a Plugin, its class or a factory of one, found an object of type str"),
        ("it = int", "expected a factory of a Plugin, but it returned an object of type int"),
        ("it = lambda: None", "it returned None"),
        ("def it(wanted): return Plugin()", "TypeError: it() missing"),
        ("import sys\nsys.exit('no')", "SystemExit: no"),
    ],
)
def test_what_is_no_plugin_is_set_aside_with_its_fault(make, add, source, fault, report):
    make("bad", source)
    add("good")
    assert "upper" in loader.writers()
    found = report("bad", deep=False)
    assert found.status == "failed"
    assert fault in found.error


@pytest.mark.parametrize(
    ("hook", "body", "fault"),
    [
        ("models", "raise RuntimeError('no')", "RuntimeError: no"),
        ("models", "raise SystemExit(1)", "SystemExit: 1"),
        ("models", "return None", "models() should return Model objects, not None"),
        ("models", "return ['starter']", "among them is an object of type str"),
        ("models", "yield Model('a', 'captioner', Path())\n        raise OSError('later')", "OSError: later"),
        ("models", "return [Model('a/b', 'captioner', Path())]", "ValueError: a model cannot be named 'a/b'"),
        ("models", "return 2 * [Model('a', 'captioner', Path())]", "two models of kind captioner named a"),
        ("captioners", "return []", "captioners() should return a mapping"),
        ("captioners", "return {'blip': 5}", "'blip' has an object of type int"),
        ("writers", "return None", "writers() should return a mapping of names to factories, not None"),
        ("writers", "return {7: list}", "one is 7"),
        ("writers", "return {'': list}", "one is ''"),
    ],
)
def test_a_hook_that_raises_or_returns_nonsense_sets_its_plugin_aside(make, add, hook, body, fault, report):
    make("bad", f"class it(Plugin):\n    def {hook}(self):\n        {body}\n")
    add("good")
    getattr(loader, hook)()
    found = report("bad", deep=False)
    assert (found.status, found.distribution, found.version) == ("failed", "bad", "2.5")
    assert fault in found.error
    (problem,) = loader.problems()
    assert "bad of bad 2.5" in problem
    assert fault in problem
    assert "good-tiny" in [model.name for model in loader.models()]
    assert "upper" in loader.writers()


def test_a_plugin_that_failed_in_one_hook_is_not_asked_for_another(make):
    make("bad", "class it(Plugin):\n    def models(self): return 5\n    def writers(self): return {'w': list}\n")
    loader.models()
    assert "w" not in loader.writers()
    assert len(loader.problems()) == 1


def test_a_hook_is_called_once_a_process(make):
    make("count", "calls = []\nclass it(Plugin):\n    def models(self): calls.append(1); return []\n")
    loader.models()
    loader.models()
    loader.reports(deep=True)
    assert sys.modules["plug_count"].calls == [1]


@pytest.mark.parametrize("form", ["it", "made"])
def test_another_api_version_is_fenced_off_with_both_numbers(make, form, report):
    source = f"""
    class it(Plugin):
        api_version = {API_VERSION + 1}
        def __init__(self):
            global called
            called = True
        def models(self): raise RuntimeError
    def made(): return it()
    """
    make("newer", source, attribute=f":{form}")
    loader.models()
    found = report("newer", deep=False)
    assert found.status == "incompatible"
    assert str(API_VERSION + 1) in found.error
    assert f"this dbcap has {API_VERSION}" in found.error
    assert hasattr(sys.modules["plug_newer"], "called") == (form == "made")
    assert len(loader.problems()) == 1


def test_of_two_models_with_one_name_and_kind_the_first_wins_and_the_other_is_reported_once(make, report):
    source = "class it(Plugin):\n    def models(self): return [Model('m', 'captioner', Path('{0}'))]\n"
    make("zzz", source.format("z"))
    make("aaa", source.format("a"))
    other = "class it(Plugin):\n    def models(self): return [Model('m', 'diffusion', Path('d'))]\n"
    make("mmm", other)
    for _ in range(2):
        found = [(model.kind, str(model.folder)) for model in loader.models() if model.name == "m"]
        assert found == [("captioner", "a"), ("diffusion", "d")]
    (problem,) = loader.problems()
    assert problem == "m, of the models of the plugin zzz of zzz 2.5, is not used: aaa 2.5 has one of this name"
    assert loader.problems() == []
    clash = report("m", deep=False)
    assert (clash.status, clash.group, clash.distribution) == ("shadowed", "dbcap.plugins: models", "zzz")
    assert report("zzz", deep=False).status == "ok"


def test_a_writer_cannot_shadow_a_built_in_and_the_doctor_remembers(add, report):
    add("good")
    assert "upper" not in loader.writers({"upper", "json"})
    assert report("upper", deep=True).error == "dbcap itself has one of this name"


def test_of_two_plugins_with_one_entry_point_name_the_second_is_not_loaded(make):
    for distribution in ("bbb", "aaa"):
        make(distribution, "it = Plugin()", name="same")
    loader.models()
    assert "plug_aaa" in sys.modules
    assert "plug_bbb" not in sys.modules
    assert [text for text in loader.problems() if "same of bbb 2.5" in text and "aaa 2.5" in text]


def test_what_a_plugin_prints_does_not_reach_a_replaced_stdout(make, capsys):
    make("loud", "print('talk')\nit = Plugin()")
    loader.models()
    assert capsys.readouterr() == ("", "talk\n")


def test_a_closed_stdout_is_no_fault_of_the_plugin(add, monkeypatch):
    add("good")
    closed = io.TextIOWrapper(io.BytesIO())
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    assert "upper" in loader.writers()


# ---- in a process of its own


def run(code: str, *folders: Path, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    path = [*(str(folder) for folder in folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    env.pop("PYTHONUNBUFFERED", None)  # what waits in a buffer must not go astray either
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True)


def test_what_a_plugin_prints_does_not_reach_our_stdout(make, tmp_path):
    source = """
    import os, subprocess, sys
    def talk(when):
        print("print", when)
        sys.__stdout__.write(f"dunder {when}\\n")
        os.write(1, f"descriptor {when}\\n".encode())
        subprocess.run([sys.executable, "-c", f"print('child {when}')"])
    talk("import")
    class it(Plugin):
        def models(self):
            talk("hook")
            return []
    """
    make("loud", source)
    code = """
    from dbcap.plugins import loader
    print("before")
    loader.models()
    print("after")
    """
    done = run(code, tmp_path / "loud")
    assert done.stdout == "before\nafter\n"
    talk = {f"{how} {when}" for how in ("print", "dunder", "descriptor", "child") for when in ("import", "hook")}
    assert set(done.stderr.splitlines()) == talk


def test_loading_works_where_stdout_and_stderr_are_closed(tmp_path):
    code = """
    import os, sys
    os.close(1); os.close(2)
    sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = None
    from dbcap.plugins import loader
    names = [model.name for model in loader.models()]
    open(sys.argv[1], "w").write(" ".join(names))
    """
    out = tmp_path / "out"
    run(code, HERE / "good", arguments=(str(out),))
    assert "good-tiny" in out.read_text().split()


def test_importing_the_loader_and_naming_the_commands_loads_nothing_heavy():
    code = """
    import sys
    from dbcap.plugins import loader
    print(*sys.modules)
    loader.commands([])
    print(*sys.modules)
    """
    bare, after = (set(line.split()) for line in run(code, HERE / "good", HERE / "broken").stdout.splitlines())
    heavy = {"torch", "numpy", "PIL", "typer", "rich", "pydantic", "transformers"}
    assert not (heavy | {"importlib.metadata"}) & bare
    assert not (heavy | {"dbcap_good", "dbcap_broken"}) & after


def test_none_does_not_even_look(monkeypatch):
    monkeypatch.setenv(loader.SWITCH, "none")
    code = """
    import sys
    from dbcap.plugins import loader
    assert loader.commands([]) == {}
    print("importlib.metadata" in sys.modules)
    """
    assert run(code, HERE / "good").stdout == "False\n"
