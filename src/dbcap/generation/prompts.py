"""What to make: prompts from the command line, lists, JSON lines and tables, each with settings of its own."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from dbcap.config.layers import checked
from dbcap.errors import ConfigError, UsageError, did_you_mean
from dbcap.inputs import shown

_NUMBERS = ("seed", "steps", "guidance", "width", "height")
COLUMNS = ("prompt", "negative", *_NUMBERS, "size")
"""What a row may say. `size` is WIDTHxHEIGHT."""
_SIZE = re.compile(r"\s*(\d{1,9})\s*[xX×*]\s*(\d{1,9})\s*")  # people copy that sign
_TEXT = r"(?:[^{}|]|\{class\})*"
_ALTERNATIVES = re.compile(rf"\{{({_TEXT}(?:\|{_TEXT})+)\}}")
_OBJECT = re.compile(r'\s*\{\s*["}]')
_LINE_END = re.compile(r"\r\n|\r|\n")  # not str.splitlines: prompts may hold what else it takes for a line end
IDENTIFIER, CLASS_WORD = "[V]", "{class}"
_MARKS = re.compile(r"\[V\]|\{class\}")


@dataclass(frozen=True)
class Request:
    """One prompt, and what it overrides of the command's settings, by their names."""

    prompt: str
    where: str
    """For errors: `prompts.csv, line 3`."""
    overrides: Mapping[str, Any] = field(default_factory=dict)


def read(arguments: Sequence[str], stdin: BinaryIO | None) -> list[Request]:
    """Return the requests that arguments make, in order.

    A text is a prompt; `@FILE` is a list: a prompt a line, or JSON lines (.jsonl), or a table with a header (.csv); `-`
    is one on stdin, JSON lines if it begins with an object. A prompt that begins with @ is written @@.

    Raises UsageError for a list that cannot be read, is empty, or holds a row that makes no sense, which it names.
    """
    if list(arguments).count("-") > 1:
        raise UsageError("- (a list on stdin) was given more than once", "give it once")
    found: list[Request] = []
    for number, argument in enumerate(arguments, 1):
        if argument == "-":
            found += _listed(_stdin(stdin), "stdin", "")
        elif argument.startswith("@") and not argument.startswith("@@"):
            found += _file(argument[1:])
        elif not argument.strip():
            raise UsageError(f"prompt {number} is empty", "write what the image shall show")
        else:
            found.append(Request(_whole(argument.removeprefix("@"), f"prompt {number}"), f"prompt {number}"))
    return found


def _stdin(stdin: BinaryIO | None) -> bytes:
    try:
        return stdin.read() if stdin else b""
    except (OSError, ValueError) as error:  # a folder, or closed
        raise UsageError(f"cannot read the prompts on stdin: {getattr(error, 'strerror', None) or error}") from error


def _file(path: str) -> list[Request]:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot read the prompts @{shown(path)}: {why}", "a prompt that begins with @ is written @@"
        ) from error
    return _listed(data, shown(path), os.path.splitext(path)[1].lower())


def _whole(text: str, place: str) -> str:
    """Return a text as it is. Raises UsageError for bytes that were no UTF-8, and for halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{place}: no UTF-8", "write it in UTF-8") from None
    return text


def _listed(data: bytes, where: str, ending: str) -> list[Request]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UsageError(f"{where}, line {line}: no UTF-8", "save the list as UTF-8") from error
    as_json = ending == ".jsonl" or (where == "stdin" and _OBJECT.match(text) is not None)
    rows = list(
        _json_lines(text, where) if as_json else _table(text, where) if ending == ".csv" else _lines(text, where)
    )
    if not rows:
        raise UsageError(f"{where} holds no prompt", "write one a line")
    return rows


def _lines(text: str, where: str) -> Iterator[Request]:
    for number, line in enumerate(_LINE_END.split(text), 1):
        if line.strip():
            yield Request(line.strip(), f"{where}, line {number}")


def _json_lines(text: str, where: str) -> Iterator[Request]:
    for number, line in enumerate(_LINE_END.split(text), 1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{place}: no JSON: {error}", 'a line is like {"prompt": "a cat", "seed": 3}') from error
        if not isinstance(row, dict):
            raise UsageError(f"{place}: no JSON object", 'a line is like {"prompt": "a cat", "seed": 3}')
        yield _request({name: value for name, value in row.items() if value is not None}, place)


def _table(text: str, where: str) -> Iterator[Request]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        place = f"{where}, line {reader.line_num + 1}"  # where the row begins: quoted cells may hold line ends
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UsageError(f"{place}: no CSV: {error}", "is a quotation mark left open?") from error
        if not any(cell.strip() for cell in row):
            continue
        if header is None:
            header = [name.strip().lower() for name in row]
            _refuse_columns(header, place)
            continue
        if len(row) != len(header):
            raise UsageError(f"{place}: {len(row)} cells, and the header has {len(header)}", "quote cells with commas")
        yield _request({name: cell for name, cell in zip(header, row, strict=True) if cell.strip()}, place)


def _refuse_columns(names: Sequence[str], place: str) -> None:
    if "prompt" not in names:
        raise UsageError(f"{place}: the header has no column prompt", f"its columns can be {', '.join(COLUMNS)}")
    for number, name in enumerate(names):
        _refuse_column(name, place)
        if name in names[:number]:
            raise UsageError(f"{place}: the column {name} stands twice in the header")


def _refuse_column(name: str, place: str) -> None:
    if name not in COLUMNS:
        near = did_you_mean(name, COLUMNS)
        raise UsageError(f"{place}: there is nothing named {name!r}", near or f"it can be {', '.join(COLUMNS)}")


def _request(row: Mapping[str, Any], place: str) -> Request:
    """Return the request of a row; values are texts or JSON's."""
    for name in row:
        _refuse_column(name, place)
    for name in ("prompt", "negative"):
        if not isinstance(row.get(name, ""), str):
            raise UsageError(f"{place}: {name} is no text", "put it between quotation marks")
        _whole(row.get(name, ""), place)
    prompt = str(row.get("prompt", "")).strip()
    if not prompt:
        raise UsageError(f"{place}: there is no prompt", "write what the image shall show")
    given = {name: row[name] for name in ("negative", *_NUMBERS) if name in row}
    if "size" in row:
        size = _SIZE.fullmatch(str(row["size"]))
        if not size:
            raise UsageError(f"{place}: {row['size']!r} is no size", "write it as 512x512")
        if "width" in row or "height" in row:
            raise UsageError(f"{place}: there is a size, and a width or height too", "leave one out")
        given |= {"width": int(size[1]), "height": int(size[2])}
    return Request(prompt, place, {name: _override(name, value, place) for name, value in given.items()})


def _override(name: str, value: Any, place: str) -> Any:
    """Return a value as the command's option of that name takes it."""
    if name == "seed" and value == "random":
        raise UsageError(f"{place}: a row's seed is a number", "leave it out, and use --seed random")
    try:
        return checked(f"generate.{name}", value, place)
    except ConfigError as error:
        what = error.message.removeprefix(f"{place}: generate.")
        raise UsageError(f"{place}: {what}", error.hint) from None


def expanded(text: str) -> list[str]:
    """Return all combinations of the alternatives in a prompt, the last ones changing fastest.

    `a {red|green} {cat|dog}` -> a red cat, a red dog, a green cat, a green dog. They may hold `[V]` and `{class}`.
    """
    parts = _ALTERNATIVES.split(text)  # text, alternatives, text, alternatives, text
    choices = [part.split("|") if number % 2 else [part] for number, part in enumerate(parts)]
    return ["".join(words) for words in itertools.product(*choices)]


def count_expanded(text: str) -> int:
    """Return how many those are, without making them."""
    total = 1
    for alternatives in _ALTERNATIVES.findall(text):
        total *= alternatives.count("|") + 1
    return total


def filled(text: str, identifier: str | None, class_word: str | None, where: str, model: str) -> str:
    """Put the model's identifier and class word in the place of `[V]` and `{class}`.

    Raises UsageError where the model has none.
    """

    def word_of(mark: re.Match[str]) -> str:
        word, name = (identifier, "identifier") if mark[0] == IDENTIFIER else (class_word, "class word")
        if word is None:
            raise UsageError(
                f"{where}: {mark[0]} stands for the model's {name}, and {shown(model)} has none",
                "write it out, or use a model that dbcap trained",
            )
        return word

    return _MARKS.sub(word_of, text)
