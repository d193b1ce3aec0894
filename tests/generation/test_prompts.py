"""What a prompt, a list, a table and JSON lines say; and what of them is refused, where and how."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbcap.errors import UsageError
from dbcap.generation.prompts import Request, count_expanded, expanded, filled, read

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n")).filter(str.strip)
VALUES = st.none() | st.booleans() | st.floats() | st.integers() | TEXT
SEEDS = st.integers(0, 2**64 - 1) | st.sampled_from([0, 2**53 + 1, 2**63, 2**64 - 1])


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """Return what a list file of this name and content makes."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, content: str | bytes) -> list[Request]:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        return read([f"@{name}"], None)

    return make


def from_stdin(content: bytes) -> list[Request]:
    return read(["-"], io.BytesIO(content))


def texts(requests: list[Request]) -> list[str]:
    return [one.prompt for one in requests]


def test_arguments_keep_their_order_and_say_where_they_stand(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    found = read(["first", f"@{tmp_path}/a.txt", "-", "@@home"], io.BytesIO(b"from stdin\n"))
    assert texts(found) == ["first", "one", "two", "from stdin", "@home"]
    places = ["prompt 1", f"{tmp_path}/a.txt, line 1", f"{tmp_path}/a.txt, line 2", "stdin, line 1", "prompt 4"]
    assert [one.where for one in found] == places
    assert all(one.overrides == {} for one in found)


@pytest.mark.parametrize("text", ["a photo", " spaces stay ", "a\nb", "{red|green}", "a@b", "-x", "é 犬 🐕", "{class}"])
def test_a_text_is_a_prompt(text):
    assert read([], None) == []
    assert read([text], None) == [Request(text, "prompt 1")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", ""], "prompt 2 is empty; write what the image shall show"),
        ([" \t"], "prompt 1 is empty; write what the image shall show"),
        (["-", "-"], "- (a list on stdin) was given more than once; give it once"),
        (["caf\udce9"], "prompt 1: no UTF-8; write it in UTF-8"),
        (["@@caf\udce9"], "prompt 1: no UTF-8; write it in UTF-8"),
        (
            ["@none.txt"],
            "cannot read the prompts @none.txt: No such file or directory; a prompt that begins with @ is ",
        ),
        (["@no\nne.txt"], r"cannot read the prompts @no\nne.txt: No such file or directory; "),
        (["@"], "cannot read the prompts @: No such file or directory; "),
        (["@a\0b"], r"cannot read the prompts @a\x00b: embedded null byte; "),
        (["@folder"], "cannot read the prompts @folder: Is a directory; "),
        (["@binary"], "binary, line 2: no UTF-8; save the list as UTF-8"),
        (["@empty"], "empty holds no prompt; write one a line"),
        (["@blank.csv"], "blank.csv holds no prompt; "),
        (["@header.csv"], "header.csv holds no prompt; "),
        (["@empty.jsonl"], "empty.jsonl holds no prompt; "),
    ],
)
def test_arguments_that_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("binary").write_bytes(b"a cat\n\x89PNG\xff\xfe\n")
    Path("empty").write_bytes(b"\xef\xbb\xbf \r\n\n")
    Path("blank.csv").write_text("\n\n")
    Path("header.csv").write_text("prompt,seed\n\n")
    Path("empty.jsonl").write_text("")
    with pytest.raises(UsageError) as caught:
        read(arguments, None)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_stdin_that_cannot_be_read(tmp_path):
    class Folder(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise IsADirectoryError(21, "Is a directory")

    closed = io.BytesIO()
    closed.close()
    for stdin, why in ((Folder(), "Is a directory"), (closed, "I/O operation on closed file.")):
        with pytest.raises(UsageError, match=rf"^cannot read the prompts on stdin: {re.escape(why)}$"):
            read(["-"], stdin)
    with pytest.raises(UsageError, match=r"^stdin holds no prompt"):
        read(["-"], None)


# ---- lines


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_list_has_a_prompt_a_line(listed, mark, end):
    found = listed("p.txt", mark + end.join(["  a cat ", "", " \t", "@literal", "#5 dog", "last"]))
    assert texts(found) == ["a cat", "@literal", "#5 dog", "last"]
    assert [one.where for one in found] == [f"p.txt, line {n}" for n in (1, 4, 5, 6)]


@pytest.mark.parametrize("letter", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_only_line_ends_end_a_line(listed, letter):
    assert listed("p.txt", f"a{letter}b\nc") == [Request(f"a{letter}b", "p.txt, line 1"), Request("c", "p.txt, line 2")]


@given(st.lists(LINE, min_size=1))
def test_every_line_is_itself(lines):
    lines[0] = "x" + lines[0]  # a mark of the byte order would be taken away
    found = from_stdin("\n".join(lines).encode())
    assert texts(found) == [line.strip() for line in lines]


@pytest.mark.parametrize("text", ["{red|green} car", "{class} on the moon", "{a {class}|a cat}", "{"])
def test_a_list_on_stdin_may_begin_with_alternatives(text):
    assert texts(from_stdin(text.encode() + b"\nb")) == [text, "b"]


# ---- JSON lines


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\r\n \n"])
def test_json_lines_on_stdin_and_in_a_file(listed, start):
    content = start + b' { "prompt": " a cat ", "seed": 3, "size": "64x128", "negative": ""}\r\n\r\n{"prompt":"b"}'
    line = 1 + start.count(b"\n")
    values = {"seed": 3, "width": 64, "height": 128, "negative": ""}
    for where, found in (("stdin", from_stdin(content)), ("p.jsonl", listed("p.jsonl", content))):
        first, second = found
        assert first == Request("a cat", f"{where}, line {line}", values)
        assert second == Request("b", f"{where}, line {line + 2}")


def test_all_of_a_row(listed):
    row = {"prompt": "x", "negative": "n", "seed": 7, "steps": 9, "guidance": 3, "width": 8, "height": 16}
    (found,) = listed("p.JSONL", json.dumps(row))
    assert found.overrides == {name: value for name, value in row.items() if name != "prompt"}
    assert isinstance(found.overrides["guidance"], float)
    assert listed("p.jsonl", json.dumps(dict.fromkeys(row, None) | {"prompt": "x"}))[0].overrides == {}


@given(SEEDS)
def test_seeds_are_exact(seed):
    (from_json,) = from_stdin(json.dumps({"prompt": "x", "seed": seed}).encode())
    assert from_json.overrides["seed"] == seed
    assert type(from_json.overrides["seed"]) is int


BIG = "9" * 5000


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[]", 'no JSON object; a line is like {"prompt": "a cat", "seed": 3}'),
        ('"a cat"', "no JSON object; "),
        ("a cat", "no JSON: Expecting value"),
        ('{"prompt": "x"', "no JSON: "),
        ("[" * 100_000, "no JSON: "),
        (f'{{"prompt": "x", "seed": {BIG}}}', "no JSON: Exceeds the limit"),
        ("{}", "there is no prompt; write what the image shall show"),
        ('{"prompt": null}', "there is no prompt; "),
        ('{"prompt": " "}', "there is no prompt; "),
        ('{"prompt": 5}', "prompt is no text; put it between quotation marks"),
        ('{"prompt": ["x"]}', "prompt is no text; "),
        (r'{"prompt": "\ud83d"}', "no UTF-8; "),
        (r'{"prompt": "x", "negative": "\udcff"}', "no UTF-8; "),
        ('{"prompt": "x", "negative": false}', "negative is no text; "),
        ('{"prompt": "x", "sede": 1}', "there is nothing named 'sede'; did you mean seed?"),
        ('{"Prompt": "x"}', "there is nothing named 'Prompt'; did you mean prompt?"),
        ('{"prompt": "x", "scheduler": "ddim"}', "there is nothing named 'scheduler'; it can be "),
        ('{"prompt": "x", "seed": "random"}', "a row's seed is a number; leave it out, and use --seed random"),
        ('{"prompt": "x", "seed": true}', "seed = true is not allowed: it must be "),
        ('{"prompt": "x", "seed": 1.5}', "seed = 1.5 is not allowed: it must be "),
        ('{"prompt": "x", "seed": -1}', "seed = -1 is not allowed: it must be "),
        ('{"prompt": "x", "seed": 18446744073709551616}', "seed = 18446744073709551616 is not allowed: "),
        ('{"prompt": "x", "seed": 1.8446744073709552e19}', "seed = 1.8446744073709552e+19 is not allowed: "),
        ('{"prompt": "x", "seed": NaN}', "seed = NaN is not allowed: "),
        ('{"prompt": "x", "steps": 0}', "steps = 0 is not allowed: it must be an integer of at least 1"),
        ('{"prompt": "x", "steps": [20]}', "steps = [20] is not allowed: "),
        ('{"prompt": "x", "guidance": NaN}', "guidance = NaN is not allowed: it must be a number of at least 0"),
        ('{"prompt": "x", "guidance": Infinity}', "guidance = Infinity is not allowed: "),
        ('{"prompt": "x", "guidance": 1e999}', "guidance = Infinity is not allowed: "),
        ('{"prompt": "x", "guidance": {"a": "\\n"}}', "guidance = {"),
        ('{"prompt": "x", "width": 0}', "width = 0 is not allowed: it must be an integer of at least 1"),
        ('{"prompt": "x", "size": "0x8"}', "width = 0 is not allowed: "),
        ('{"prompt": "x", "size": 512}', "512 is no size; write it as 512x512"),
        ('{"prompt": "x", "size": "8 by 8"}', "'8 by 8' is no size; "),
        (f'{{"prompt": "x", "size": "{BIG}x8"}}', "'999"),
        ('{"prompt": "x", "size": "-8x8"}', "'-8x8' is no size; "),
        ('{"prompt": "x", "size": "8x8", "height": 9}', "there is a size, and a width or height too; leave one out"),
    ],
)
def test_rows_that_are_refused_by_their_line(listed, row, message):
    with pytest.raises(UsageError) as caught:
        listed("generate.jsonl", f'{{"prompt": "sound"}}\n\n{row}\n{{"prompt": ""}}\n')
    text = str(caught.value)
    assert text.startswith(f"generate.jsonl, line 3: {message}")
    assert "\n" not in text


@given(
    st.dictionaries(st.sampled_from(["prompt", "seed", "steps", "guidance", "size", "x"]), VALUES | st.lists(VALUES))
)
def test_a_row_is_a_request_or_an_error_that_names_it(row):
    try:
        (found,) = from_stdin(json.dumps(row).encode() if row else b"{}")
    except UsageError as error:
        where = str(error)
    else:
        where = found.where
        assert found.prompt == row["prompt"].strip()
        assert set(found.overrides) <= {"seed", "steps", "guidance", "width", "height"}
        assert 0 <= found.overrides.get("seed", 0) < 2**64
    assert where.startswith("stdin, line 1")


# ---- tables


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_table(listed, mark, end):
    lines = [' Prompt , seed,"SIZE",negative', "", 'a cat,"3", 64 X 32 ,', '"a ""big"", red dog",,,"no, no"', " , ,,"]
    found = listed("p.CSV", mark + end.join(lines))
    assert found == [
        Request("a cat", "p.CSV, line 3", {"seed": 3, "width": 64, "height": 32}),
        Request('a "big", red dog', "p.CSV, line 4", {"negative": "no, no"}),
    ]


def test_ways_to_write_a_size(listed):
    found = listed("p.csv", "prompt,size\na,64x32\na,64X32\na,64×32\na,64*32\na, 64 x 32 \n")
    assert [one.overrides for one in found] == [{"width": 64, "height": 32}] * 5


def test_a_row_is_named_by_the_line_where_it_begins(listed):
    head = 'prompt,seed\n"a\nb\n\nc",1\n'
    first, second = listed("p.csv", head + '"d\ne",2\n')
    assert (first.prompt, first.where) == ("a\nb\n\nc", "p.csv, line 2")
    assert (second.prompt, second.where) == ("d\ne", "p.csv, line 6")
    with pytest.raises(UsageError, match=r"^p\.csv, line 6: seed = 'many' is not allowed"):
        listed("p.csv", head + '"d\ne",many\n')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,seed\nx,1\n", "line 1: the header has no column prompt; its columns can be prompt, negative, seed, "),
        ("\n\nprompt;seed\nx;1\n", "line 3: the header has no column prompt; "),
        ("prompt,stepps\nx,1\n", "line 1: there is nothing named 'stepps'; did you mean steps?"),
        ("prompt,seed,\nx,1,\n", "line 1: there is nothing named ''; it can be "),
        ("prompt,seed,seed\nx,1,2\n", "line 1: the column seed stands twice in the header"),
        ("prompt,seed\nx,1\nred, big,1\n", "line 3: 3 cells, and the header has 2; quote cells with commas"),
        ("prompt,seed\nx\n", "line 2: 1 cells, and the header has 2; "),
        ("prompt,seed\n,1\n", "line 2: there is no prompt; "),
        ('prompt,seed\nx,1\n"y,2\nz,3\n', "line 3: no CSV: unexpected end of data; is a quotation mark left open?"),
        ('prompt\n"a" b\n', "line 2: no CSV: "),
        (f"prompt\n{'x' * 200_000}\n", "line 2: no CSV: field larger than field limit"),
        ("prompt,seed\nx,random\n", "line 2: a row's seed is a number; "),
        ("prompt,seed\nx,1e3\n", "line 2: seed = '1e3' is not allowed: "),
        (f"prompt,seed\nx,{BIG}\n", "line 2: seed = '999"),
        ("prompt,guidance\nx,nan\n", "line 2: guidance = 'nan' is not allowed: "),
        ('prompt,guidance\nx,"7,5"\n', "line 2: guidance = '7,5' is not allowed: "),
    ],
)
def test_tables_that_are_refused(listed, content, message):
    with pytest.raises(UsageError) as caught:
        listed("generate.csv", content)
    assert str(caught.value).startswith(f"generate.csv, {message}")
    assert "\n" not in str(caught.value)


@given(st.lists(st.tuples(TEXT.filter(str.strip), SEEDS), min_size=1, max_size=5))
def test_what_the_csv_module_writes_is_read(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "p.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([("prompt", "seed"), *rows])
    found = read([f"@{path}"], None)
    assert [(one.prompt, one.overrides["seed"]) for one in found] == [(text.strip(), seed) for text, seed in rows]


# ---- alternatives


def naive(text: str) -> list[str]:
    """Replace the first alternatives by each of them, and begin again: told by counting braces, letter by letter."""
    for start in (at for at, letter in enumerate(text) if letter == "{"):
        depth, cuts = 0, [start]
        for at in range(start, len(text)):
            if text[at] == "{":
                depth += 1
                if depth > 1 and not text.startswith("{class}", at):
                    break
            elif text[at] == "|" and depth == 1:
                cuts.append(at)
            elif text[at] == "|":
                break
            elif text[at] == "}":
                depth -= 1
                if depth == 0:
                    cuts.append(at)
                    break
        if depth == 0 and len(cuts) > 2:
            words = [text[a + 1 : b] for a, b in itertools.pairwise(cuts)]
            rest = naive(text[at + 1 :])
            return [text[:start] + word + after for word in words for after in rest]
    return [text]


@pytest.mark.parametrize(
    ("text", "results"),
    [
        ("a {red|green} {cat|dog}", ["a red cat", "a red dog", "a green cat", "a green dog"]),
        ("{a|b}{c|d}", ["ac", "ad", "bc", "bd"]),
        ("a {|very }big cat", ["a big cat", "a very big cat"]),
        ("{a|a}", ["a", "a"]),
        ("{|}", ["", ""]),
        ("{a photo of {class}|[V] {class}} here", ["a photo of {class} here", "[V] {class} here"]),
        ("{{class}|cat}", ["{class}", "cat"]),
        ("{class}", ["{class}"]),
        ("{one} a|b} {c|d", ["{one} a|b} {c|d"]),
        ("{a\n|b}", ["a\n", "b"]),
        ("", [""]),
    ],
)
def test_expansion(text, results):
    assert expanded(text) == naive(text) == results
    assert count_expanded(text) == len(results)


@given(st.lists(st.sampled_from(["{", "}", "|", "a", " ", "{class}", "[V]", "{a|b}"]), max_size=14).map("".join))
def test_expansion_is_that_of_a_naive_one(text):
    assert expanded(text) == naive(text)
    assert count_expanded(text) == len(naive(text))


def test_counting_makes_nothing():
    assert count_expanded("{a|b}" * 200) == 2**200


def test_braces_without_an_end_take_no_time():
    text = "{" * 20_000 + "{a{class}" * 2_000 + "|" * 20_000
    assert expanded(text) == [text]


# ---- the model's words


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("a photo of [V] {class}", "a photo of sks dog"),
        ("[V][V] {class}s", "skssks dogs"),
        ("[v] {Class} {classes} V", "[v] {Class} {classes} V"),
        ("", ""),
    ],
)
def test_filling_in(text, result):
    assert filled(text, "sks", "dog", "prompt 1", "model") == result


def test_what_is_filled_in_is_not_looked_at_again():
    assert filled("[V] {class}", "{class}", "[V]", "prompt 1", "m") == "{class} [V]"
    assert filled("[V] {class}", "", "", "prompt 1", "m") == " "


@pytest.mark.parametrize(
    ("text", "identifier", "word", "message"),
    [
        ("[V]", None, "dog", "p.txt, line 2: [V] stands for the model's identifier, and starter has none; "),
        ("{class}", "sks", None, "p.txt, line 2: {class} stands for the model's class word, and starter has none; "),
    ],
)
def test_a_model_without_words(text, identifier, word, message):
    with pytest.raises(UsageError) as caught:
        filled(f"a {text}", identifier, word, "p.txt, line 2", "starter")
    assert str(caught.value) == message + "write it out, or use a model that dbcap trained"
    assert filled("a cat", None, None, "p.txt, line 2", "starter") == "a cat"
