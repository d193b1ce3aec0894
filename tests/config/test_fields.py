"""What a field knows, and that every field of every command says all that option, variable, key and docs need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from dbcap.config import fields
from dbcap.config.layers import RESERVED_VARIABLES, known_fields
from dbcap.config.models import SECTIONS, CaptionConfig, CommonConfig

FIELDS = known_fields()


@pytest.mark.parametrize(
    ("key", "words", "metavar"),
    [
        ("quiet", "true or false", "TEXT"),
        ("log_file", "text", "FILE"),
        ("caption.dtype", "one of auto, float32, bfloat16, float16", "WORD"),
        ("caption.batch_size", "auto or an integer of at least 1", "auto|N"),
        ("caption.num_beams", "an integer of at least 1 and of at most 256", "N"),
        ("caption.workers", "an integer of at least 0 and of at most 256", "N"),
        ("caption.seed", f"an integer of at least 0 and of at most {2**64 - 1}", "N"),
        ("caption.top_p", "a number above 0 and of at most 1", "X"),
        ("caption.length_penalty", "a number of at least -100 and of at most 100", "X"),
        ("caption.model", "text that is not empty", "MODEL"),
        ("caption.replace", "a list of text", "OLD=NEW"),
        ("caption.device", "auto, cpu, cuda, cuda:N or mps", "DEVICE"),
        ("caption.with_filename", "true or false", "TEXT"),
    ],
)
def test_a_field_says_what_it_takes(key, words, metavar):
    assert fields.allowed(FIELDS[key]) == words
    assert fields.metavar_of(FIELDS[key]) == metavar


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("progress", "on"),
        ("quiet", ""),
        ("caption.seed", "0"),
        ("caption.dtype", "auto"),
        ("caption.num_beams", "the model's own, else 1"),
        ("caption.replace", ""),
        ("caption.prompt", ""),
    ],
)
def test_a_field_says_what_holds_when_nothing_is_set(key, text):
    assert fields.default_text(FIELDS[key]) == text


def test_names_are_derived_from_the_field_alone():
    assert fields.flag_of("num_beams") == "--num-beams"
    assert fields.variable_of("caption.num_beams") == "DBCAP_CAPTION__NUM_BEAMS"
    assert fields.variable_of("log_file") == "DBCAP_LOG_FILE"


def test_kinds():
    assert fields.is_switch(FIELDS["quiet"])
    assert fields.is_switch(FIELDS["caption.with_filename"])
    assert not fields.is_switch(FIELDS["caption.seed"])
    assert [key for key, field in FIELDS.items() if fields.is_list(field)] == [
        "caption.replace",
        "prep.class_prompts",
        "train.class_prompts",
        "generate.lora",
        "generate.embedding",
    ]
    assert fields.choices(FIELDS["caption.batch_size"]) == ("auto",)


@pytest.mark.parametrize("key", FIELDS)
def test_every_field_is_described_and_has_its_place_in_the_help(key):
    field = FIELDS[key]
    cli = fields.cli_of(field)
    assert field.description
    assert field.description.endswith(".")
    assert field.description.isascii()  # help is printed in any locale
    assert cli.group != "Options", "an option stands under a heading"
    assert fields.allowed(field)
    if field.default is None and not fields.is_switch(field):
        assert fields.default_text(field) or fields.allowed(field).startswith("text"), (
            "say what holds when it is not set"
        )


def test_no_two_fields_share_a_variable_or_a_flag():
    variables = [*RESERVED_VARIABLES, *map(fields.variable_of, FIELDS)]
    assert len(variables) == len(set(variables))
    for section, model in SECTIONS.items():
        flags: list[str] = []
        for known in (model, CommonConfig):
            for name, field in known.model_fields.items():
                own = [part for flag in fields.cli_of(field).flags for part in flag.split("/")]
                long = [] if any(flag.startswith("--") for flag in own) else [fields.flag_of(name)]
                flags += [*own, *long] if not fields.cli_of(field).argument else []
        assert len(flags) == len(set(flags)), section
        assert not {"--profile", "--config", "--set", "--help"} & set(flags)


def test_defaults_are_allowed_values():
    assert CaptionConfig(inputs=("x",)).dtype == "auto"
    assert CommonConfig().progress is True


def test_settings_are_frozen_and_know_their_keys():
    config = CaptionConfig(inputs=("x",))
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 5
    with pytest.raises(ValidationError, match="Extra inputs"):
        CaptionConfig(inputs=("x",), num_beems=4)
    assert json.loads(config.model_dump_json())["inputs"] == ["x"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_p": 0.5}, "--top-p needs --sample"),
        ({"top_k": 5}, "--top-k needs --sample"),
        ({"temperature": 0.5}, "--temperature needs --sample"),
        ({"sample": True, "num_beams": 2}, "--sample and --num-beams exclude each other"),
        ({"sample": True, "length_penalty": 2.0}, "--length-penalty needs beams"),
        ({"min_length": 9, "max_length": 8}, "--min-length 9 is above --max-length 8"),
        ({"num_beams": 0}, "greater than or equal to 1"),
        ({"num_captions": 0}, "greater than or equal to 1"),
        ({"max_length": 0}, "greater than or equal to 1"),
        ({"top_p": 1.5, "sample": True}, "less than or equal to 1"),
        ({"temperature": 0.0, "sample": True}, "greater than or equal to 0.01"),
        ({"template": "x"}, "--template has no {caption}"),
        ({"replace": ("a=b", "c")}, "--replace 'c' is not of the form OLD=NEW"),
        ({"replace": ("=c",)}, "--replace '=c' is not of the form OLD=NEW"),
        ({"extension": "txt"}, "--extension 'txt' must begin with a dot"),
        ({"extension": "./x"}, "must begin with a dot"),
        ({"extension": "."}, "must begin with a dot"),
        ({"format": "sidecar", "output": "x"}, "--format sidecar writes beside the images"),
        ({"format": "xmp", "output": "x"}, "--format xmp writes beside the images"),
        ({"resume": True}, "--resume needs -o FILE"),
        ({"resume": True, "output": "-"}, "--resume needs -o FILE"),
        ({"resume": True, "output": "x", "force": True}, "--resume and --force exclude each other"),
    ],
)
def test_combinations_that_cannot_work_are_refused_by_name(values, message):
    with pytest.raises(ValidationError) as caught:
        CaptionConfig(inputs=("x",), **values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"sample": True, "top_p": 0.5, "top_k": 5, "temperature": 2.0, "num_beams": 1},
        {"min_length": 8, "max_length": 8},
        {"resume": True, "output": "x"},
        {"format": "metadata", "output": "x"},
        {"replace": ("a=", "b=c=d")},
        {"inputs": ("a\udcff.jpg",), "output": "\udcff"},
    ],
)
def test_combinations_that_work(values):
    config = CaptionConfig(**{"inputs": ("x",), **values})
    assert {name: getattr(config, name) for name in values} == values


def test_the_module_of_fields_stays_light():
    assert "pydantic_settings" not in Path(fields.__file__).read_text()
