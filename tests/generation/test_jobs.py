"""A job's key stands for all that decides its pixels; its file name is a plain one, whatever the prompt."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbcap.errors import UsageError
from dbcap.generation.jobs import LONGEST_NAME, Job, check_template, fitting, named, slug

DIGEST = "ab" * 32
JOB = Job(DIGEST, "a photo of a cat 🐕", "", 0, 512, 512, "ddim", 30, 7.5)
FIELDS = {"index": 7, "seed": 2**64 - 1, "prompt": "a-cat", "date": "2026-11-25", "run": "dog-1", "step": 400}
SEEDS = st.integers(0, 2**64 - 1)

OTHERS: dict[str, list[Any]] = {
    "model": ["cd" * 32, ""],
    "prompt": ["a photo of a cat", "a photo of a cat \U0001f415 ", "\udcff", "a\nb"],
    "negative": ["blurry", " ", "a photo of a cat 🐕"],
    "seed": [1, 2**32, 2**53, 2**53 + 1, 2**64 - 2, 2**64 - 1],
    "width": [504, 520],
    "height": [504, 520],
    "scheduler": ["pndm", "euler"],
    "steps": [29, 31],
    "guidance": [0.0, 1.0, 7.499999999999999],
    "guidance_rescale": [0.7, 1e-9],
    "eta": [0.5, 1.0],
    "long_prompt": ["chunk", "error"],
    "init": [DIGEST],
    "mask": [DIGEST],
    "strength": [0.0, 0.8],
    "additions": [((DIGEST, 1.0),), ((DIGEST, 0.5),), ((DIGEST, 0.0),), ((DIGEST, 1.0), ("cd" * 32, 1.0))],
}


# ---- keys


def test_every_field_is_tried():
    assert set(OTHERS) == {field.name for field in dataclasses.fields(Job)}


def test_the_key_changes_with_every_field():
    changed = [dataclasses.replace(JOB, **{name: value}) for name, values in OTHERS.items() for value in values]
    swapped = dataclasses.replace(JOB, additions=(("cd" * 32, 1.0), (DIGEST, 1.0)))
    keys = [one.key for one in (JOB, swapped, *changed)]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch("[0-9a-f]{64}", key) for key in keys)


def test_the_key_stays_what_it_was():
    """Images of older versions must be found: if this fails, the key has changed."""
    whole = dataclasses.replace(JOB, **{name: values[0] for name, values in OTHERS.items()})
    assert JOB.key == "9ad32396d7e47f6592a48b7a4728012b4da571d2a4a797c2b5ab3ca9dd930cf9"
    assert whole.key == "06e602b7b4412979bde90b0eb60ff03127a2de66e15ee2ab591c95be41af0653"


def test_the_key_does_not_depend_on_the_process():
    code = (
        "from dbcap.generation.jobs import Job\n"
        f"fields = {dataclasses.asdict(JOB)!r}\n"
        "print(Job(**dict(reversed(fields.items()))).key)"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": "C"}
        printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
        assert printed.decode().strip() == JOB.key


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"guidance": 7.0}, {"guidance": 7}),
        ({"guidance": 0.0}, {"guidance": -0.0}),
        ({"eta": 0.0}, {"eta": 0}),
        ({"strength": 1.0}, {"strength": 1}),
        ({"guidance_rescale": -0.0}, {}),
        ({"additions": ((DIGEST, 1.0),)}, {"additions": [[DIGEST, 1]]}),
    ],
)
def test_equal_numbers_make_equal_keys(one, other):
    """One comes from the command line, the other from JSON."""
    assert dataclasses.replace(JOB, **one).key == dataclasses.replace(JOB, **other).key


@given(st.lists(SEEDS, unique=True, min_size=2, max_size=20))
def test_every_seed_has_a_key_of_its_own(seeds):
    assert len({dataclasses.replace(JOB, seed=seed).key for seed in seeds}) == len(seeds)


# ---- slugs and names


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("a photo of [V] {class}", "a-photo-of-v-class"),
        ("../../etc/passwd", "etc-passwd"),
        ("..", "image"),
        ("", "image"),
        ("🐕🐈", "image"),
        ("a 🐕 dog", "a-dog"),
        ("Ünïcode ÉTÉ", "ünïcode-été"),
        ("犬の写真", "犬の写真"),
        ("\u202ecat\u202c שלום", "cat-שלום"),
        ("a\0b\nc\td\x1be\x7f", "a-b-c-d-e"),
        ("a\\b:c*d?e", "a-b-c-d-e"),
        ("ｆｕｌｌ ﬁne", "full-fine"),
        ("-.hidden.-", "hidden"),
        ("caf\udce9", "caf"),
        ("x" * 100, "x" * 60),
        ("x" * 59 + "é", "x" * 59),
        ("x" * 59 + " y", "x" * 59),
    ],
)
def test_slugs(text, result):
    assert slug(text) == result


@given(st.text(max_size=200), st.integers(1, 80))
def test_a_slug_holds_letters_digits_and_single_dashes(text, most):
    short = slug(text, most)
    assert len(short.encode()) <= max(most, len("image"))
    assert short == "-".join(re.split("-+", short.strip("-")))
    assert all(letter == "-" or letter.isalnum() for letter in short)
    assert short


@given(
    st.text(max_size=300),
    SEEDS,
    st.sampled_from(
        ["{index:05d}-{seed}", "{prompt}-{seed}", "{seed}{prompt}{prompt}{prompt}{prompt}", "é" * 200 + "{seed}"]
    ),
    st.sampled_from([".png", "-2.png", "-1000000.webp"]),
)
def test_a_name_stays_in_the_folder_and_is_short_enough(prompt, seed, template, suffix):
    check_template(template)
    name = fitting(named(template, {**FIELDS, "prompt": slug(prompt), "seed": seed}), suffix)
    assert len(os.fsencode(name)) <= LONGEST_NAME
    assert name.endswith(suffix)
    assert os.path.basename(name) == name
    assert not name.startswith(".")
    assert not any(unicodedata.category(letter).startswith("C") for letter in name)


@pytest.mark.parametrize("length", range(240, 258))
def test_fitting_takes_all_the_room_there_is(length):
    assert fitting("x" * length, "-2.png") == "x" * min(length, 249) + "-2.png"
    assert len(fitting("é" * length, ".png").encode()) in (254, 255)


def test_a_file_of_the_longest_name_can_be_written(tmp_path):
    path = tmp_path / fitting("犬" * 300, "-2.png")
    path.write_bytes(b"x")
    assert path.read_bytes() == b"x"


# ---- templates


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{index:05d}-{seed}", "00007-18446744073709551615"),
        ("{index}", "7"),
        ("{seed:x}", "f" * 16),
        ("{seed:#X}", "0X" + "F" * 16),
        ("{seed:_}", "18_446_744_073_709_551_615"),
        ("{index:>4}", "   7"),
        ("{index:*^5d}", "**7**"),
        ("{index:+}", "+7"),
        ("{prompt!r}{index}", "'a-cat'7"),
        ("{prompt:.3}{index}", "a-c7"),
        ("{prompt:_<8}{index!s:0>3}", "a-cat___007"),
        ("{{{index}}}", "{7}"),
        ("{date}-{index}", "2026-11-25-7"),
        ("写真 {index}", "写真 7"),
        ("{run}-{step:06d}-{index}", "dog-1-000400-7"),
    ],
)
def test_templates(template, name):
    check_template(template)
    assert named(template, FIELDS) == name


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{index.__class__}", "--name has no field {index.__class__}; "),
        ("{index[0]}", "--name has no field {index[0]}; "),
        ("{index.__class__.__mro__[1]}{seed}", "--name has no field {index.__class__.__mro__[1]}; "),
        ("{index:{seed.__class__}}", "--name: {index:{seed.__class__}} has no format for file names; try {index:05d}"),
        ("{index:{seed}}", "--name: {index:{seed}} has no format"),
        ("{index:{seed!r:>9}}", "--name: {index:{seed!r:>9}} has no format"),
        ("{index:9999999999}", "--name: {index:9999999999} has no format"),
        ("{prompt:.99999999}{seed}", "--name: {prompt:.99999999} has no format"),
        ("{index:c}", "--name: {index:c} has no format"),
        ("{seed:f}", "--name: {seed:f} has no format"),
        ("{seed:e}", "--name: {seed:e} has no format"),
        ("{seed:%}", "--name: {seed:%} has no format"),
        ("{seed:\n}", r"--name: {seed:\n} has no format"),
        ("{}", "--name has no field {}; "),
        ("{0}", "--name has no field {0}; "),
        ("{sed}", "--name has no field {sed}; did you mean seed?"),
        ("{qqq}", "--name has no field {qqq}; there are index, seed, prompt, date, run, step"),
        ("{index", "--name '{index' cannot be read: "),
        ("index}", "--name 'index}' cannot be read: "),
        ("{index!x}", "--name '{index!x}' cannot be filled in: "),
        ("{prompt:d}{seed}", "--name '{prompt:d}{seed}' cannot be filled in: "),
        ("{index:.3d}", "--name '{index:.3d}' cannot be filled in: "),
        ("plain", "--name gives all images one name; let it hold {index} or {seed}"),
        ("{prompt}-{date}", "--name gives all images one name; "),
        ("{run}-{step}", "--name gives all images one name; "),
        ("{run:d}{seed}", "--name '{run:d}{seed}' cannot be filled in: "),
        ("{{index}}", "--name gives all images one name; "),
        ("../{index}", "--name gives '../0', which is no plain file name; use --out for the folder"),
        ("/tmp/{index}", "--name gives '/tmp/0', which is no plain file name; "),
        ("a/{index}", "--name gives 'a/0', which is no plain file name; "),
        ("{index:/>2}", "--name gives '/0', which is no plain file name; "),
        (".{index}", "--name gives '.0', which is no plain file name; "),
        ("{index!s:.0}", "--name gives '', which is no plain file name; "),
        ("a\nb{index}", r"--name gives 'a\nb0', which is no plain file name; "),
        ("a\x1b[31m{index}", r"--name gives 'a\x1b[31m0', which is no plain file name; "),
        ("a\0{index}", r"--name gives 'a\x000', which is no plain file name; "),
        ("\udcff{index}", r"--name gives '\udcff0', which is no plain file name; "),
    ],
)
def test_templates_that_are_refused(template, message):
    with pytest.raises(UsageError) as caught:
        check_template(template)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@given(
    st.lists(st.sampled_from(["{", "}", "index", "seed", ":", "!", "r", ">", "05", "d", "x", "/", ".", "c", "\n"])).map(
        "".join
    )
)
def test_what_passes_makes_names_and_what_does_not_is_one_line(template):
    try:
        check_template(template)
    except UsageError as error:
        text = str(error)
    else:
        text = ""
        for fields in (FIELDS, {**FIELDS, "index": 47, "seed": 0}, {**FIELDS, "index": 10**6, "prompt": "犬"}):
            name = named(template, fields)
            assert os.path.basename(name) == name
            assert "\n" not in name
    assert "\n" not in text


def test_what_the_fields_hold_cannot_leave_the_folder():
    for run in ("../up", "a/b", "a\nb", "a\0"):
        with pytest.raises(UsageError, match="is no plain file name"):
            named("{prompt}{index}", {**FIELDS, "prompt": run})
    with pytest.raises(UsageError, match=r"--name '\{date\}' cannot be filled in: 'date'"):
        named("{date}", {"index": 1})
