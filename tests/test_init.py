"""`import dbcap` is cheap; its names are there all the same, for people and for type checkers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dbcap

NAMES = ["Caption", "Captioner", "pipeline"]


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_dbcap_loads_nothing_heavy():
    heavy = ("torch", "transformers", "numpy", "PIL", "pydantic", "dbcap.captioning")
    code = f"import sys, dbcap; dir(dbcap), dbcap.__version__; print([name for name in {heavy} if name in sys.modules])"
    assert in_a_fresh_process(code) == "[]"


def test_names_are_listed_before_they_are_loaded_and_loaded_when_asked_for():
    code = f"""
import sys, dbcap
assert set({NAMES}) <= set(dir(dbcap)), dir(dbcap)
assert not hasattr(dbcap, "Captoiner") and "torch" not in sys.modules
from dbcap import Captioner, pipeline, web
print(Captioner.__module__, pipeline.__module__, dbcap.Captioner is Captioner, "torch" in sys.modules, web.__name__)
"""
    assert in_a_fresh_process(code) == "dbcap.captioning.api dbcap.captioning.pipeline True True dbcap.web"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dbcap' has no attribute 'Captoiner'"):
        dbcap.Captoiner  # noqa: B018
    assert all(getattr(dbcap, name) for name in dbcap.__all__)


@pytest.mark.slow
def test_type_checkers_see_the_names_the_options_and_the_results(tmp_path):
    (tmp_path / "use.py").write_text(
        "from collections.abc import Iterator\n"
        "from dbcap import Caption, Captioner, pipeline\n"
        "c = Captioner.load('starter')\n"
        "one: Caption = c.caption('a.jpg', num_beams=4)\n"
        "some: list[Caption] = c.caption(['a.jpg', b''])\n"
        "more: Iterator[Caption] = c.caption(name for name in ['a.jpg'])\n"
        "reveal_type(pipeline('image-to-text').device)\n"
        "c.caption('a.jpg', num_beam=4)\n"
    )
    command = [sys.executable, "-m", "mypy", "--no-incremental", "--follow-imports=silent", "use.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    told = [line for line in done.stdout.splitlines() if line.startswith("use.py:")]
    assert 'Revealed type is "torch' in told[0], done.stdout
    assert told[1].startswith('use.py:8: error: Unexpected keyword argument "num_beam"')
    assert {line.split(":")[1] for line in told[1:]} == {"8"}


def test_what_type_checkers_read_is_what_is_loaded():
    folder = Path(dbcap.__file__).parent
    assert (folder / "py.typed").is_file()
    tree = ast.parse((folder / "__init__.py").read_text("utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    static = {alias.name: node.module for node in block.body for alias in node.names}
    assert static == dbcap._HOMES
    assert {*static, "__version__"} == set(dbcap.__all__)
