"""Choosing the word that will mean the subject, on real vocabularies."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import dbcap_starter
from dbcap.dataset.identifier import choose
from dbcap.dataset.remembering import Remembering
from dbcap.errors import UsageError
from dbcap.events import Silent


@pytest.fixture(scope="module")
def clip(shared):
    return AutoTokenizer.from_pretrained(shared / "tokenizers" / "clip")


@pytest.fixture(scope="module")
def starter():
    return AutoTokenizer.from_pretrained(dbcap_starter.samples().parent / "diffusion" / "tokenizer")


def check(word, tokenizer):
    (token,) = tokenizer(word, add_special_tokens=False).input_ids
    assert word.isascii()
    assert word.islower()
    assert 3 <= len(word) <= 4
    return token


def test_a_rare_word_of_the_real_vocabulary(clip, told):
    heard = told()
    word = choose("auto", "dog", clip, heard)
    token = check(word, clip)
    assert token > 0.99 * len(clip)
    assert heard.said == [
        f"the identifier is {word}: token {token:,} of 49,408, the last ones being the rarest, and no word by itself,"
        " but an ending as in credits"
    ]
    assert choose("auto", "cat", clip, Silent()) == word
    words = {piece.removesuffix("</w>") for piece in clip.get_vocab()}
    assert not any(other.startswith(word) for other in words - {word})


def test_a_rare_word_of_the_starters_vocabulary(starter):
    word = choose("auto", None, starter, Silent())
    assert check(word, starter) > 0.8 * len(starter)
    assert word == choose("auto", "dog", starter, Silent())


def test_the_choice_keeps_clear_of_the_class_word(clip):
    usual = choose("auto", None, clip, Silent())
    other = choose("auto", f"x{usual.upper()}x", clip, Silent())
    check(other, clip)
    assert other not in (usual, "sks")


def of_words(*words):
    """A tokenizer that knows whole words only."""
    plain = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    return PreTrainedTokenizerFast(tokenizer_object=plain)


def test_a_vocabulary_without_a_rare_word():
    with pytest.raises(UsageError) as refused:
        choose("auto", None, of_words("a", "xyzzy", "rst", "sks", "Cat", "owl"), Silent())
    assert str(refused.value) == "the model's tokenizer has no rare word of one token; name one: --identifier WORD"


def test_without_a_mere_ending_the_rarest_word_is_taken(told):
    heard = told()
    assert choose("auto", None, of_words("dog", "cat", "sks", "ox"), heard) == "cat"
    assert heard.said == ["the identifier is cat: token 1 of 4, the last ones being the rarest"]


@pytest.mark.parametrize(
    ("word", "warning"),
    [
        ("sks", "a rifle"),
        ("SKS", "a rifle"),
        ("zqxwv", "tokens, which mean something already"),
        ("my friend", "is 2 tokens"),
        ("ohwx", ""),
    ],
)
def test_words_that_are_named(word, warning, clip):
    heard = Remembering(Silent())
    assert choose(word, "dog", clip, heard) == word
    assert len(heard.warnings) == bool(warning)
    assert warning in "".join(heard.warnings)


@pytest.mark.parametrize(
    ("word", "class_word"),
    [("dog", "dog"), ("DOG", "dog"), ("bear", "teddy bear"), ("my dog", "Dog"), ("dogo", "dog"), ("og", "dog")],
)
def test_a_clash_is_refused(word, class_word, starter):
    with pytest.raises(UsageError) as refused:
        choose(word, class_word, starter, Silent())
    assert refused.value.message == f"--identifier {word} clashes with the class word {class_word}"


def test_a_mark_is_no_word(starter):
    with pytest.raises(UsageError) as refused:
        choose("[V]", "dog", starter, Silent())
    assert refused.value.message == "--identifier '[V]' is no word"
