"""The identifier and the class word in captions and prompts: filled in for their marks, and put into what is there."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dbcap.errors import UsageError
from dbcap.events import Events
from dbcap.generation import prompts
from dbcap.generation.prompts import CLASS_WORD, IDENTIFIER
from dbcap.inputs import shown

VOWELS = "aeiou"
_MARKS = re.compile(r"\[V\]|\{class\}")
_ARTICLE = re.compile(r"\b([Aa])n?(\s+)(?=\{class\})")
_AN = re.compile(r"\b([Aa])n(\s+)$")


@dataclass(frozen=True)
class Words:
    """The word that means the subject, and what kind of thing it is, if that was said."""

    identifier: str
    class_word: str | None

    def fill(self, text: str) -> str:
        """Put the words in the place of `[V]` and `{class}`; without a class word `{class}` falls away.

        `a {class}` becomes `an {class}` before a vowel, and the other way round.
        """
        word = self.class_word or ""
        if word:
            text = _ARTICLE.sub(lambda match: match[1] + "n" * _begins_with_vowel(word) + match[2], text)
        filled = _MARKS.sub(lambda mark: self.identifier if mark[0] == IDENTIFIER else word, text)
        if not word and CLASS_WORD in text:
            filled = re.sub(r" +([,.;:!?])", r"\1", " ".join(filled.split()))
        return filled.strip()

    def put_into(self, caption: str) -> str:
        """Put the identifier into a caption that knows nothing of it: `a dog on grass` -> `a WORD dog on grass`.

        It comes before the class word where that stands first; where it does not stand, `WORD dog, ` comes before all.
        """
        if self.names(caption):
            return caption
        found = _word(self.class_word).search(caption) if self.class_word else None
        if not found:
            return ", ".join(filter(None, [" ".join(filter(None, [self.identifier, self.class_word])), caption]))
        before = caption[: found.start()]
        if not _begins_with_vowel(self.identifier):  # an eagle, but a WORD eagle
            before = _AN.sub(r"\1\2", before)
        return f"{before}{self.identifier} {caption[found.start() :]}"

    def renamed(self, text: str, identifier: str) -> str:
        """Put another identifier in the place of this one."""
        return _word(self.identifier).sub(lambda _: identifier, text)

    def names(self, text: str) -> bool:
        """Return whether a text names the subject, by `[V]` or by the identifier."""
        return IDENTIFIER in text or _word(self.identifier).search(text) is not None


def _word(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)", re.IGNORECASE)


def _begins_with_vowel(word: str) -> bool:
    return word[:1].lower() in VOWELS


def plain(what: str, text: str) -> str:
    """Return a word as it stands in captions. Raises UsageError for one that cannot: a mark, or no printable text."""
    word = " ".join(text.split())
    if not word or not word.isprintable() or _MARKS.search(word):
        raise UsageError(f"{what} {shown(text)!r} is no word", "write letters, as in dog")
    return word


def class_prompts(values: Sequence[str], class_word: str, events: Events) -> tuple[str, ...]:
    """Return the prompts of class images. A value without spaces is a file with one a line.

    Raises UsageError for a file that cannot be read or sets more than prompts, and for a prompt that holds `[V]`.
    """
    fill = Words("", class_word).fill
    found = []
    for value in values:
        for place, text in _listed(value):
            prompt = fill(text)
            if IDENTIFIER in text or not prompt:
                raise UsageError(
                    f"{place}: {shown(text)!r} is no prompt of the class", "[V] is the subject, no other of its kind"
                )
            if not _word(class_word).search(prompt):
                events.warn(f"{place}: {prompt!r} does not name the class, {class_word}")
            found.append(prompt)
    if not found:
        raise UsageError("--class-prompts is empty", "--class-images 0 makes none")
    return tuple(found)


def _listed(value: str) -> list[tuple[str, str]]:
    """Return place and text of the prompts that one value of --class-prompts stands for."""
    if " " in value.strip():
        return [("--class-prompts", value)]
    path = os.path.expanduser(value)
    if not os.path.isfile(path):
        raise UsageError(
            f"--class-prompts {shown(value)}: there is no such file", "a value without spaces is a file of prompts"
        )
    requests = prompts.read([f"@{path}"], None)
    for one in requests:
        if one.overrides:
            raise UsageError(f"{one.where}: prompts of the class have no settings of their own", "leave them out")
    return [(one.where, one.prompt) for one in requests]
