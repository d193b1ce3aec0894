"""Each place on its own: what it may hold, and the one line that names place, key, allowed values and nearest match."""

from __future__ import annotations

import pytest

from dbcap.config.layers import checked, from_environment, from_file, nearest_key, normal_key
from dbcap.errors import ConfigError


@pytest.fixture(autouse=True)
def _isolated(home):
    pass


def refusal(call, *arguments):
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "raw", "value"),
    [
        ("quiet", "on", True),
        ("quiet", "0", False),
        ("caption.num_beams", "4", 4),
        ("caption.num_beams", 4, 4),
        ("caption.batch_size", "8", 8),
        ("caption.batch_size", "auto", "auto"),
        ("caption.length_penalty", -1, -1.0),
        ("caption.length_penalty", "-1.5", -1.5),
        ("caption.seed", str(2**64 - 1), 2**64 - 1),
        ("caption.replace", "a=b", ("a=b",)),
        ("caption.replace", '["a=b", "c=d"]', ("a=b", "c=d")),
        ("caption.replace", ["a=b"], ("a=b",)),
        ("caption.replace", "[a=b", ("[a=b",)),
        ("caption.replace", "a=b=c", ("a=b=c",)),
        ("caption.replace", "a\nb=", ("a\nb=",)),
        ("caption.alpha", "White", "White"),
        ("caption.alpha", "#00FFaa", "#00FFaa"),
        ("caption.device", "cuda:12", "cuda:12"),
        ("caption.extension", ".a.b", ".a.b"),
        ("caption.template", "{stem}\n{caption}!", "{stem}\n{caption}!"),
        ("caption.prefix", " x ", " x "),
        ("caption.output", "\udcff.jsonl", "\udcff.jsonl"),
    ],
)
def test_values_are_converted(key, raw, value):
    found = checked(key, raw, "here")
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("key", "raw", "shown", "allowed"),
    [
        ("caption.num_beams", "0", "'0'", "an integer of at least 1"),
        ("caption.num_beams", "4.5", "'4.5'", "an integer"),
        ("caption.num_beams", True, "true", "an integer"),
        ("caption.batch_size", True, "true", "auto or an integer of at least 1"),
        ("caption.batch_size", "", "''", "auto or an integer of at least 1"),
        ("caption.temperature", "nan", "'nan'", "a number of at least 0.01 and of at most 100"),
        ("caption.length_penalty", "inf", "'inf'", "a number"),
        ("caption.length_penalty", float("nan"), "NaN", "a number"),
        ("caption.top_p", 1.5, "1.5", "a number above 0 and of at most 1"),
        ("caption.seed", 2**64, str(2**64), "of at most"),
        ("caption.prefix", 5, "5", "text"),
        ("caption.replace", {"a": "b"}, '{"a": "b"}', "a list of text"),
        ("caption.replace", ["a=b", 5], '["a=b", 5]', "a list of text"),
        ("caption.replace", "[5]", "[5]", "a list of text"),
        ("caption.model", "", "''", "text that is not empty"),
        ("quiet", "maybe", "'maybe'", "true or false"),
        ("caption.alpha", "purple", "'purple'", "white, black or #rrggbb"),
        ("caption.alpha", "#12345", "'#12345'", "white, black or #rrggbb"),
        ("caption.alpha", "#123456\n", r"'#123456\n'", "white, black or #rrggbb"),
        ("caption.device", "cuda:x", "'cuda:x'", "auto, cpu, cuda, cuda:N or mps"),
        ("caption.device", "gpu", "'gpu'", "auto, cpu, cuda, cuda:N or mps"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(key, raw, shown, allowed):
    text = refusal(checked, key, raw, "here")
    assert text.startswith(f"here: {key} = {shown} is not allowed: it must be ")
    assert allowed in text


def test_a_wrong_word_gets_the_nearest_one():
    assert refusal(checked, "caption.dtype", "bfloat", "here").endswith("; did you mean bfloat16?")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("caption.num_beems", "caption.num_beams"),
        ("captoin.num_beams", "caption.num_beams"),
        ("num_beams", "caption.num_beams"),
        ("caption.quiet", "quiet"),
        ("quite", "quiet"),
        ("caption.offlin", "offline"),
        ("caption.sead", "caption.seed"),
        ("caption.zzzzzz", ""),
        ("zzz", ""),
    ],
)
def test_the_nearest_key(key, nearest):
    assert nearest_key(key) == nearest


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("caption.zzzzzz", "the keys here are device, dtype"),
        ("zzz", "the keys here are quiet, verbose, progress, log_file, offline, allow_pickle, caption.*"),
        ("zzz.zzz", "the keys here are quiet"),
        ("caption", "caption is a table, not a key"),
        ("profile", "a profile is chosen by --profile"),
        ("caption.inputs", "there is no key caption.inputs"),
    ],
)
def test_a_key_like_no_other_gets_the_list(key, hint):
    assert hint in refusal(checked, key, "x", "here")


def test_keys_may_be_typed_with_dashes():
    assert normal_key(" caption.num-beams ") == "caption.num_beams"


# ---- files


@pytest.fixture
def file(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.toml", 'quiet = true\n[caption]\nnum_beams = 4\nreplace = ["a=b"]\n'),
        ("a.toml", 'caption.num_beams = 4\ncaption.replace = ["a=b"]\nquiet = true\n'),
        ("a.yaml", "quiet: true\ncaption:\n  num_beams: 4\n  replace: [a=b]\n"),
        ("a.YML", "quiet: yes\ncaption: {num_beams: 4, replace: ['a=b']}\n"),
    ],
)
def test_toml_and_yaml_say_the_same(file, name, content):
    layer = from_file(file(name, content), "origin")
    assert layer.origin == "origin"
    assert layer.values == {"quiet": True, "caption.num_beams": 4, "caption.replace": ("a=b",)}


@pytest.mark.parametrize(("name", "content"), [("a.toml", ""), ("a.yaml", ""), ("a.yaml", "caption:\n")])
def test_an_empty_file_sets_nothing(file, name, content):
    assert from_file(file(name, content), "origin").values == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.toml",
            "quiet = true\n[caption]\nnum_beams =\n",
            "a.toml is not valid: Invalid value (at line 3, column 12)",
        ),
        ("a.toml", b"\xff", "a.toml is not valid: 'utf-8' codec can't decode byte 0xff in position 0"),
        ("a.toml", "quiet = 1\nquiet = 0\n", "a.toml is not valid: Cannot overwrite a value (at line 2"),
        ("a.yaml", "quiet: true\ncaption: [", "line 2, column 11"),
        ("a.yaml", b"\xff", "a.yaml is not valid"),
        ("a.yaml", "- quiet", "a.yaml is not valid: it must hold keys and tables"),
        ("a.yaml", "quiet", "a.yaml is not valid: it must hold keys and tables"),
        ("a.yaml", "5: 3", "a.yaml is not valid: it must hold keys and tables"),
        ("a.yaml", "!!python/object/apply:os.getcwd []", "a.yaml is not valid: could not determine a constructor"),
        ("a.yaml", "caption: {5: 3}", "there is no key caption.5"),
        ("a.toml", "caption = 3", "caption is a table, not a value; write [caption] above its keys"),
        ("a.toml", "[captoin]\nx = 1", "there is no table [captoin]; did you mean caption?"),
        ("a.toml", "[zzz]\nx = 1", "there is no table [zzz]; the tables are caption"),
        ("a.toml", "[caption.zzz]\nx = 1", "there is no key caption.zzz"),
        ("a.toml", "[caption]\nnum-beams = 1", "there is no key caption.num-beams; did you mean caption.num_beams?"),
        ("a.toml", "[caption]\nquiet = true", "there is no key caption.quiet; did you mean quiet?"),
        ("a.toml", "profile = 'x'", "there is no key profile; a profile is chosen by --profile"),
        ("a.toml", "[caption]\ninputs = ['x']", "there is no key caption.inputs"),
    ],
)
def test_a_broken_file_is_named_with_line_or_key(file, name, content, message):
    path = file(name, content)
    text = refusal(from_file, path, "origin")
    assert text.startswith(str(path))
    assert message in text


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    assert refusal(from_file, tmp_path / "no.toml", "o") == f"there is no configuration file {tmp_path / 'no.toml'}"
    assert str(tmp_path) in refusal(from_file, tmp_path, "o")
    locked = tmp_path / "locked.toml"
    locked.write_text("")
    locked.chmod(0)
    if not _may_read(locked):
        assert refusal(from_file, locked, "o") == f"cannot read {locked}: Permission denied"


def _may_read(path):
    try:
        path.read_bytes()
    except PermissionError:
        return False
    return True


def test_keys_can_be_skipped(file):
    assert from_file(file("a.toml", "profile = 'x'\nquiet = true"), "o", skip=("profile",)).values == {"quiet": True}


def test_a_mark_of_utf_8_before_a_file_is_no_mistake(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xef\xbb\xbf[caption]\r\nseed = 7\r\n")
    assert from_file(path, "o").values == {"caption.seed": 7}


# ---- environment


def test_variables_set_keys_and_tables(monkeypatch):
    monkeypatch.setenv("DBCAP_QUIET", "true")
    monkeypatch.setenv("DBCAP_CAPTION__NUM_BEAMS", "4")
    monkeypatch.setenv("DBCAP_CAPTION__REPLACE", '["a=b", "c=d"]')
    monkeypatch.setenv("DBCAP_CAPTION__PREFIX", "")  # a text may be empty
    monkeypatch.setenv("DBCAP_CAPTION__MAX_LENGTH", "")  # a number cannot: the variable was cleared
    assert from_environment().values == {
        "quiet": True,
        "caption.num_beams": 4,
        "caption.replace": ("a=b", "c=d"),
        "caption.prefix": "",
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DBCAP_CAPTION__NUM_BEEMS", "did you mean DBCAP_CAPTION__NUM_BEAMS?"),
        ("DBCAP_CAPTOIN__NUM_BEAMS", "did you mean DBCAP_CAPTION__NUM_BEAMS?"),
        ("DBCAP_NUM_BEAMS", "did you mean DBCAP_CAPTION__NUM_BEAMS?"),
        ("DBCAP_CAPTION__ZZZZZZ", "docs/config.md lists the names"),
        ("DBCAP_CAPTION", "docs/config.md lists the names"),
        ("DBCAP_CAPTION__REPLACE__X", "did you mean DBCAP_CAPTION__REPLACE?"),
        ("DBCAP_QUITE", "did you mean DBCAP_QUIET?"),
        ("DBCAP_PROFIL", "did you mean DBCAP_PROFILE?"),
    ],
)
def test_a_misspelt_variable_is_named(monkeypatch, name, message):
    monkeypatch.setenv(name, "1")
    assert refusal(from_environment) == f"environment: there is no variable {name}; {message}"


@pytest.mark.parametrize(
    "name", ["DBCAP_GALLERY_FOLDER", "DBCAP_CLUSTER__HOST", "DBCAP_FOO", "DBCAP_DEBUG", "DBCAPTION"]
)
def test_variables_that_may_be_a_plugins_are_left_alone(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert from_environment().values == {}


def test_a_wrong_value_names_its_variable(monkeypatch):
    monkeypatch.setenv("DBCAP_CAPTION__DTYPE", "float23")
    text = refusal(from_environment)
    assert text.startswith("DBCAP_CAPTION__DTYPE: caption.dtype = 'float23' is not allowed: it must be one of auto,")
    assert text.endswith("did you mean float32?")
