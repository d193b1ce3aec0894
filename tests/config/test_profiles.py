"""Named sets of settings."""

from __future__ import annotations

import pytest

from dbcap.config import paths, profiles, store
from dbcap.config.resolve import Given, active_profile, resolve
from dbcap.errors import ConfigError, UsageError

KEY = "caption.num_beams"
STARTER = profiles.BUILTIN["starter"]
MODELS = ("caption.model", "prep.model", "prep.captioner", "train.model", "train.captioner", "generate.model")


@pytest.fixture(autouse=True)
def _isolated(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_starter_comes_with_dbcap_and_points_every_command_at_the_starter_models():
    layer = profiles.load("starter", "named")
    assert (layer.origin, layer.values) == ("profile starter (named)", STARTER)
    assert [key for key, value in layer.values.items() if value == "starter"] == sorted(MODELS, key=list(STARTER).index)
    assert {key: STARTER[key] for key in ("generate.guidance", "train.lr", "train.steps", "train.batch_size")} == {
        "generate.guidance": 3.0,
        "train.lr": 1e-5,
        "train.steps": 400,
        "train.batch_size": 4,
    }
    assert profiles.names() == ["starter"]


def test_a_profile_is_created_used_and_deleted():
    path = store.create_profile("fast", {KEY: "1", "quiet": "true", "caption.replace": "a=b"})
    assert path == paths.profiles_dir() / "fast.toml"
    assert profiles.load("fast", "named").values == {KEY: 1, "quiet": True, "caption.replace": ("a=b",)}
    assert profiles.names() == ["starter", "fast"]
    store.use_profile("fast")
    assert active_profile() == "fast"
    assert resolve(Given()).origins[KEY] == "profile fast (active)"
    store.delete_profile("fast")
    assert active_profile() == ""
    assert profiles.names() == ["starter"]
    assert resolve(Given()).origins[KEY] == "default"


def test_an_empty_profile_can_be_created():
    store.create_profile("empty", {})
    assert profiles.load("empty", "named").values == {}


def test_a_profile_begins_with_another():
    store.create_profile("offline", {"offline": "true"}, base="starter")
    assert profiles.load("offline", "named").values == {**STARTER, "offline": True}
    store.create_profile("other", {"caption.model": "org/name"}, base="offline")
    assert profiles.load("other", "named").values == {**STARTER, "caption.model": "org/name", "offline": True}
    with pytest.raises(ConfigError, match=r"there is no profile offlin; did you mean offline\?"):
        store.create_profile("third", {}, base="offlin")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "-a", ".hidden", "a b", "a\n", "ä", "a" * 65])
def test_what_is_no_file_name_is_no_profile_name(name):
    for call in (store.create_profile, lambda n, _: store.delete_profile(n), lambda n, _: profiles.load(n, "named")):
        with pytest.raises(UsageError, match="is no profile name; use letters, digits, dot, dash and underscore"):
            call(name, {})
    assert not paths.profiles_dir().exists()


@pytest.mark.parametrize("name", ["a", "A-1", "v1.5", "a_b", "7", "a" * 64])
def test_good_names(name):
    store.create_profile(name, {})
    assert name in profiles.names()


def test_a_taken_name_is_refused():
    path = store.create_profile("fast", {KEY: "1"})
    with pytest.raises(UsageError, match=f"there is a profile fast already; change {path}, or choose another name"):
        store.create_profile("fast", {KEY: "2"})
    assert profiles.load("fast", "named").values == {KEY: 1}
    with pytest.raises(UsageError, match="there is a profile starter already; choose another name"):
        store.create_profile("starter", {})


def test_the_built_in_profile_cannot_be_deleted():
    with pytest.raises(UsageError, match="starter comes with dbcap"):
        store.delete_profile("starter")


def test_wrong_keys_and_values_make_no_profile():
    with pytest.raises(ConfigError, match=r"did you mean caption\.num_beams\?"):
        store.create_profile("fast", {"caption.num_beems": "1"})
    with pytest.raises(ConfigError, match="it must be an integer of at least 1"):
        store.create_profile("fast", {KEY: "0"})
    assert profiles.names() == ["starter"]


def test_only_what_exists_can_be_used_or_deleted():
    for call in (store.use_profile, store.delete_profile):
        with pytest.raises(ConfigError, match=r"there is no profile startre; did you mean starter\?"):
            call("startre")
    assert not paths.config_file().exists()


def test_making_none_active_writes_no_file_where_there_is_none():
    store.use_profile(None)
    assert not paths.config_file().exists()


def test_using_a_profile_keeps_the_users_file():
    paths.config_file().write_text("# mine\nquiet = true # yes\n\n[caption]\nseed = 1\n")
    store.use_profile("starter")
    assert paths.config_file().read_text() == (
        '# mine\nquiet = true # yes\nprofile = "starter"\n\n[caption]\nseed = 1\n'
    )
    store.use_profile(None)
    assert paths.config_file().read_text() == "# mine\nquiet = true # yes\n\n[caption]\nseed = 1\n"


def test_deleting_another_profile_leaves_the_active_one():
    store.create_profile("fast", {})
    store.use_profile("starter")
    store.delete_profile("fast")
    assert active_profile() == "starter"


def test_files_that_can_be_no_profile_are_no_matter():
    paths.profiles_dir().mkdir()
    (paths.profiles_dir() / "my profile.toml").write_text("")
    (paths.profiles_dir() / "starter.toml").write_text("quiet = true")
    (paths.profiles_dir() / "notes.txt").write_text("")
    assert profiles.names() == ["starter"]
    assert "quiet" not in profiles.load("starter", "named").values


def test_a_broken_profile_is_named():
    paths.profiles_dir().mkdir()
    path = paths.profiles_dir() / "bad.toml"
    path.write_text("quiet = ")
    with pytest.raises(ConfigError, match=f"{path} is not valid"):
        profiles.load("bad", "named")
