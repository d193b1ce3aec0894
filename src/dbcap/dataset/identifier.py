"""The word that will mean the subject: one that the model reads as one token, and knows little of."""

from __future__ import annotations

import re
from typing import Any

from dbcap.dataset.words import VOWELS, plain
from dbcap.errors import UsageError
from dbcap.events import Events

AUTO = "auto"
RIFLE = "sks"
_SHAPE = re.compile(rf"(?![{VOWELS}])(?=.*[{VOWELS}])[a-z]{{3,4}}")
"""A consonant first, so that `a` may stand before it, and a vowel, so that it can be said."""


def choose(asked: str, class_word: str | None, tokenizer: Any, events: Events) -> str:
    """Return the identifier that was `asked` for, or with `auto` a rare word of the model's own tokenizer.

    Says why it was chosen, and warns of `sks` and of words that are several tokens. Raises UsageError for one that
    stands in the class word or holds it, whatever the case, for one that is no word, and where `auto` finds none.
    """
    if asked == AUTO:
        word, why = _rare(class_word, tokenizer)
        events.say(f"the identifier is {word}: {why}")
        return word
    word = plain("--identifier", asked)
    if class_word and _clash(word, class_word):
        raise UsageError(f"--identifier {word} clashes with the class word {class_word}", "auto picks a rare word")
    if word.lower() == RIFLE:
        events.warn("the identifier sks is a rifle to many base models, and may bring one into pictures")
    tokens = tokenizer(word, add_special_tokens=False, verbose=False).input_ids
    if len(tokens) > 1:
        events.warn(
            f"the identifier {word} is {len(tokens)} tokens, which mean something already; auto picks a single rare one"
        )
    return word


def _clash(word: str, class_word: str) -> bool:
    one, other = word.lower(), class_word.lower()
    return one in other or other in one


def _rare(class_word: str | None, tokenizer: Any) -> tuple[str, str]:
    """Return the rarest fitting word, and why it was chosen.

    Byte-pair vocabularies count up from the most common merge to the rarest. Names and rare words stand at that end
    too. So a token is preferred that other words end with and none begins with: a mere ending, which as a word by
    itself says nothing. Where no token is one, the rarest that looks like a word is taken.
    """
    ranked = sorted(
        ((_piece(token), number) for token, number in tokenizer.get_vocab().items()), key=lambda one: one[1]
    )
    ends: dict[str, str] = {}
    begins: set[str] = set()
    for word, _ in ranked:
        for cut in range(1, len(word)):
            ends.setdefault(word[cut:], word)
            begins.add(word[:cut])
    rare = [(word, number) for word, number in reversed(ranked) if _fits(word, number, class_word, tokenizer)]
    if not rare:
        raise UsageError("the model's tokenizer has no rare word of one token", "name one: --identifier WORD")
    word, number = next((one for one in rare if one[0] in ends and one[0] not in begins), rare[0])
    why = f"token {number:,} of {len(ranked):,}, the last ones being the rarest"
    if word in ends and word not in begins:
        why += f", and no word by itself, but an ending as in {ends[word]}"
    return word, why


def _fits(word: str, number: int, class_word: str | None, tokenizer: Any) -> bool:
    """Return whether a word of this token can be an identifier."""
    if not _SHAPE.fullmatch(word) or word == RIFLE or (class_word and _clash(word, class_word)):
        return False
    tokens: list[int] = tokenizer(word, add_special_tokens=False, verbose=False).input_ids
    return tokens == [number]


def _piece(token: str) -> str:
    """Return what a token spells, without a tokenizer's mark of where words begin or end."""
    return token.removesuffix("</w>").lstrip("▁Ġ")
