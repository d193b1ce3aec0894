"""What `--model` may say."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbcap.errors import ModelError, UsageError
from dbcap.models.specs import ModelSpec, named_or_folder, parse


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("nlpconnect/vit-gpt2-image-captioning", "nlpconnect/vit-gpt2-image-captioning", "main"),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("Org_1/na.me-2@" + "a" * 40, "Org_1/na.me-2", "a" * 40),
    ],
)
def test_a_hub_model(text, repo, revision):
    assert parse(text) == ModelSpec(text, "hub", repo=repo, revision=revision)


def test_an_existing_folder_wins_over_the_hub():
    assert parse("org/name").kind == "hub"
    Path("org/name").mkdir(parents=True)
    assert parse("org/name") == ModelSpec("org/name", "folder", path=Path("org/name"))


@pytest.mark.parametrize("text", ["./model", "model/", "../{}/model", "{}/model", "~/model", ".", "model/sub/.."])
def test_a_path_is_a_folder(text, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model/sub").mkdir(parents=True)
    text = text.replace("../{}", f"../{tmp_path.name}").replace("{}", str(tmp_path))
    spec = parse(text)
    assert spec.kind == "folder"
    assert spec.path is not None
    assert spec.path.resolve() in (tmp_path, tmp_path / "model")


@pytest.mark.parametrize("text", ["./none", "../none", "/none/at/all", "~/none", "~nobody-here/x", "org/name/"])
def test_a_path_that_does_not_exist(text):
    with pytest.raises(ModelError, match="no such folder") as failure:
        parse(text)
    assert text in failure.value.message
    assert not isinstance(failure.value, UsageError)


@pytest.mark.parametrize("text", ["./model.bin", "sub/model.bin"])
def test_a_file_is_no_model(text):
    Path("sub").mkdir()
    Path(text).touch()
    with pytest.raises(UsageError, match=r"is a file.*ORG/NAME@REVISION"):
        parse(text)


@pytest.mark.parametrize(
    "text",
    "| |"
    " starter|a/b/c|org/name@|org/name@a..b|org/name@-x|a--b/c|org/name.git|-x|name@main|a b/c|"
    f"org/na\0me|org/.name|{'o' * 60}/{'n' * 60}|org/name@a//b".split("|"),
)
def test_what_fits_no_form(text):
    with pytest.raises(UsageError, match="ORG/NAME") as failure:
        parse(text)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("text", "name", "revision"),
    [
        ("run:dog-1", "dog-1", "final"),
        ("run:Dog_1.2@last", "Dog_1.2", "last"),
        ("run:dog@best", "dog", "best"),
        ("run:dog@200", "dog", "200"),
        ("run:one.safetensors", "one.safetensors", "final"),
    ],
)
def test_a_run_and_its_checkpoints(text, name, revision):
    Path(text).mkdir()
    assert parse(text) == ModelSpec(text, "run", name=name, revision=revision)
    assert parse(f"./{text}/").kind == "folder"


@pytest.mark.parametrize(
    "text", ["run:", "run:a/b", "run:..", "run:-x", "run:x@", "run:x@first", "run:x@1.5", "run:x@-1", "run:x@last@2"]
)
def test_what_is_no_run(text):
    with pytest.raises(UsageError) as failure:
        parse(text)
    assert failure.value.hint == "a run is written run:NAME, or run:NAME@STEP, @last or @best"


def test_an_address_of_the_hub_is_told_how_to_write_it():
    with pytest.raises(UsageError, match=r"write org/name$"):
        parse("https://huggingface.co/org/name/tree/main")


def test_a_word_is_a_name_first_and_a_folder_second():
    Path("starter").mkdir()
    spec = parse("starter")
    assert spec == ModelSpec("starter", "named", name="starter")
    assert named_or_folder(spec, ["starter"]) is spec
    assert named_or_folder(spec, ["other"]) == ModelSpec("starter", "folder", path=Path("starter"))
    other = parse("nothing")
    assert named_or_folder(other, ["starter"]) is other


def test_a_word_that_is_a_file_is_no_model():
    Path("model.bin").touch()
    with pytest.raises(UsageError, match="is a file"):
        named_or_folder(parse("model.bin"), [])
