"""The examples of docs/python.md and docs/migrating.md run: Python as it stands, and every `dbcap` command line."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from dbcap.captioning.api import CaptionOptions
from dbcap.cli.app import run

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("python.md", "migrating.md")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


PYTHON = [(page, place) for page in PAGES for place in range(len(blocks(page, "python")))]
COMMANDS = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]


@pytest.fixture
def here(home, tmp_path, samples, monkeypatch) -> Path:
    """A folder with the images that the examples name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "more").mkdir(parents=True)
    names = ["photo.jpg", "a.jpg", "b.jpg", "photos/c.jpg", "photos/d.jpg", "photos/more/e.jpg"]
    for name, sample in zip(names, samples, strict=False):
        shutil.copyfile(sample, tmp_path / name)
    return tmp_path


@pytest.fixture
def with_ours(published_model, blip_captioner, git_captioner):
    """Return a function that puts tiny models, with 64 positions, in the place of those of the hub."""
    folders = {
        "nlpconnect/vit-gpt2-image-captioning": published_model,
        "Salesforce/blip-image-captioning-base": blip_captioner,
        "Salesforce/blip-image-captioning-large": blip_captioner,
        "microsoft/git-large-textcaps": git_captioner,
        "https://example.org/cat.jpg": "photo.jpg",
    }

    def call(text: str) -> str:
        for name, ours in folders.items():
            text = text.replace(name, str(ours))
        return re.sub(r"--max-length \d+", "--max-length 40", text)

    return call


def test_there_are_examples_of_everything():
    assert len(PYTHON) >= 7
    assert {line.split()[0] for line in COMMANDS} == {"dbcap"}
    assert len(COMMANDS) >= 5
    assert len(blocks("migrating.md", "py")) + len(blocks("migrating.md", "text")) == 5, "each has a before"


@pytest.mark.parametrize(("page", "place"), PYTHON, ids=lambda value: str(value))
def test_python_examples_run_and_print_what_they_say(here, with_ours, capsys, page, place):
    code = blocks(page, "python")[place]
    exec(compile(with_ours(code), page, "exec"), {"__name__": "__main__"})  # noqa: S102
    out = capsys.readouterr().out
    assert out or "assert" in code
    for said in re.findall(r"print\(.*error\)  # (.*)$", code, flags=re.MULTILINE):
        assert said in out.splitlines()


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line[:60])
def test_command_lines_run(here, with_ours, capfd, line):
    words = shlex.split(with_ours(line))[1:]
    words = [name for word in words for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    assert run([*words, "--dtype", "float32"]) == 0
    out, err = capfd.readouterr()
    ending = re.search(r"--extension (\S+)", line)
    written = list(here.rglob(f"*{ending[1] if ending else '.txt'}"))
    assert bool(out) != bool(written), err
    if "--replace" in line:
        assert all(path.read_text().strip() and "picture" not in path.read_text() for path in written)


def test_every_keyword_is_on_the_page_and_every_link_leads_somewhere():
    page = (DOCS / "python.md").read_text("utf-8")
    assert [name for name in CaptionOptions.__annotations__ if f"`{name}`" not in page] == []
    for name in PAGES:
        text = (DOCS / name).read_text("utf-8")
        anchors = {
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
        }
        targets = re.findall(r"\]\(([^):]+)\)", text)
        assert targets
        for target in targets:
            file, _, anchor = target.partition("#")
            assert (DOCS / file).exists(), target
            assert not anchor or anchor in anchors, (target, anchors)
