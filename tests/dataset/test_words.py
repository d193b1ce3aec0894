"""Identifier and class word in captions and prompts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbcap.dataset.remembering import Remembering
from dbcap.dataset.words import Words, class_prompts, plain
from dbcap.errors import UsageError
from dbcap.events import Silent


@pytest.mark.parametrize(
    ("text", "word", "filled"),
    [
        ("a photo of [V] {class}", "dog", "a photo of sks dog"),
        ("a photo of [V] {class}", None, "a photo of sks"),
        ("a photo of a {class}", "dog", "a photo of a dog"),
        ("a photo of a {class}", "owl", "a photo of an owl"),
        ("An {class} and an {class}", "dog", "A dog and a dog"),
        ("a [V] {class} on grass", "owl", "a sks owl on grass"),
        ("the [V] {class} , in snow", None, "the sks, in snow"),
        ("a banana {class}", "owl", "a banana owl"),
        ("a  photo, as it stands", "dog", "a  photo, as it stands"),
        ("[V][V]", "dog", "skssks"),
    ],
)
def test_marks_are_filled_in(text, word, filled):
    assert Words("sks", word).fill(text) == filled


@pytest.mark.parametrize(
    ("caption", "word", "with_it"),
    [
        ("a dog sitting on grass", "dog", "a sks dog sitting on grass"),
        ("Two men and a Dog", "dog", "Two men and a sks Dog"),
        ("a dog beside a dog", "dog", "a sks dog beside a dog"),
        ("an owl at night", "owl", "a sks owl at night"),
        ("a teddy bear", "teddy bear", "a sks teddy bear"),
        ("two dogs", "dog", "sks dog, two dogs"),
        ("a hotdog", "dog", "sks dog, a hotdog"),
        ("a cat", None, "sks, a cat"),
        ("", "dog", "sks dog"),
        ("a sks dog", "dog", "a sks dog"),
    ],
)
def test_a_captioners_words_get_the_identifier(caption, word, with_it):
    assert Words("sks", word).put_into(caption) == with_it


def test_an_article_fits_an_identifier_that_begins_with_a_vowel():
    assert Words("olis", "owl").put_into("an owl") == "an olis owl"


PARTS = st.lists(st.sampled_from(["[V]", "{class}", "a", "an", ",", "photo", " "]), max_size=8)


@given(PARTS.map(" ".join), st.sampled_from(["dog", "owl", None]))
def test_nothing_is_left_of_the_marks(text, word):
    filled = Words("sks", word).fill(text)
    assert "[V]" not in filled
    assert "{class}" not in filled
    assert filled == filled.strip()
    if word is None and "{class}" in text:
        assert "  " not in filled
        assert " ," not in filled
    assert filled.count("sks") == text.count("[V]")


@pytest.mark.parametrize("text", ["[V]", "a {class}", " ", "\n", "a\x00b"])
def test_what_is_no_word(text):
    with pytest.raises(UsageError) as refused:
        plain("--class-word", text)
    assert "is no word" in refused.value.message


def test_spaces_in_a_word_are_single():
    assert plain("--class-word", " teddy \n bear ") == "teddy bear"


def test_class_prompts_are_texts_and_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa drawing of a {class}\n\na {class} in snow\n", "utf-8")
    heard = Remembering(Silent())
    assert class_prompts(("a photo of a {class}", str(path)), "owl", heard) == (
        "a photo of an owl",
        "a drawing of an owl",
        "an owl in snow",
    )
    assert heard.warnings == []


def test_a_class_prompt_without_the_class_is_doubtful():
    heard = Remembering(Silent())
    assert class_prompts(("a photo of owls",), "owl", heard) == ("a photo of owls",)
    assert heard.warnings == ["--class-prompts: 'a photo of owls' does not name the class, owl"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("dog",), "--class-prompts dog: there is no such file"),
        (("a [V] {class}",), "is no prompt of the class"),
        ((), "--class-prompts is empty"),
        (("rows.csv",), "no settings of their own"),
        (("empty.txt",), "holds no prompt"),
    ],
)
def test_what_is_no_class_prompt(values, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("prompt,seed\na dog,3\n")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UsageError) as refused:
        class_prompts(values, "dog", Silent())
    assert said in refused.value.message
