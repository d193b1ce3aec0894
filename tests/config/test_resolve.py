"""Who wins: all 128 subsets of the seven places, and one line of complaint from each of them."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from dbcap.config import paths, store
from dbcap.config.layers import known_fields
from dbcap.config.models import CaptionConfig, CommonConfig
from dbcap.config.resolve import Given, resolve
from dbcap.errors import ConfigError, UsageError

KEY = "caption.num_beams"
PLACES = ("command line", "environment", "--config", "named", "project", "active", "user")


class World:
    """Settings files in an empty home and an empty project, and what is typed."""

    def __init__(self, monkeypatch, project: Path) -> None:
        self.monkeypatch = monkeypatch
        self.project = project
        self.options: dict[str, object] = {}
        self.assignments: list[str] = []
        self.profile: str | None = None
        self.config: str | None = None
        self.origins: dict[str, str] = {}

    def put(self, place: str, table: str) -> None:
        """Let a place hold one line of the table [caption]."""
        name, _, value = table.partition(" = ")
        if place == "command line":
            self.options[f"caption.{name}"] = value.strip('"')
            self.origins[place] = "command line"
        elif place == "--set":
            self.assignments.append(f"caption.{name}={value.strip(chr(34))}")
        elif place == "environment":
            self.monkeypatch.setenv(f"DBCAP_CAPTION__{name.upper()}", value.strip('"'))
            self.origins[place] = f"environment DBCAP_CAPTION__{name.upper()}"
        else:
            self.put_file(place, f"[caption]\n{table}\n")

    def put_file(self, place: str, content: str) -> None:
        path = {
            "--config": self.project / "run.toml",
            "--config yaml": self.project / "run.yaml",
            "named": paths.profiles_dir() / "fast.toml",
            "project": self.project / "dbcap.toml",
            "active": paths.profiles_dir() / "daily.toml",
            "user": paths.config_file(),
        }[place]
        self.origins[place] = {
            "--config": f"--config {path}",
            "named": "profile fast (named)",
            "active": "profile daily (active)",
        }.get(place, str(path))
        if place == "--config yaml":
            content = content.replace("[caption]\n", "caption:\n  ").replace(" = ", ": ")
        if place.startswith("--config"):
            self.config = str(path)
        elif place == "named":
            self.profile = "fast"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        if place == "active":
            paths.config_file().write_text('profile = "daily"\n')
        if place == "user" and "active" in self.origins:
            path.write_text('profile = "daily"\n' + content)

    def resolve(self):
        return resolve(Given(self.options, self.assignments, "caption", self.config, self.profile))


@pytest.fixture
def world(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return World(monkeypatch, tmp_path)


@pytest.mark.parametrize("strongest", [*range(len(PLACES)), None])
def test_of_every_subset_of_the_places_the_strongest_wins_and_is_named(home, tmp_path, monkeypatch, strongest):
    """All subsets whose strongest member is this one: 64 + 32 + ... + 1, and the empty one."""
    monkeypatch.chdir(tmp_path)
    if strongest is None:
        found = resolve(Given())
        assert (found.values[KEY], found.origins[KEY]) == (None, "default")
        return
    weaker = range(strongest + 1, len(PLACES))
    for size in range(len(weaker) + 1):
        for others in itertools.combinations(weaker, size):
            with pytest.MonkeyPatch.context() as patch:
                paths.config_file().unlink(missing_ok=True)
                (tmp_path / "dbcap.toml").unlink(missing_ok=True)
                world = World(patch, tmp_path)
                for place in (strongest, *others):
                    world.put(PLACES[place], f"num_beams = {place + 1}")
                found = world.resolve()
                assert found.values[KEY] == strongest + 1, others
                assert found.origins[KEY] == world.origins[PLACES[strongest]], others


def test_places_are_merged_key_by_key(world):
    keys = ("num_beams", "seed", "workers", "max_length", "top_k", "min_length", "num_captions")
    for place, name in zip(PLACES, keys, strict=True):
        world.put(place, f"{name} = 7")
    found = world.resolve()
    for place, name in zip(PLACES, keys, strict=True):
        assert found.values[f"caption.{name}"] == 7, name
        assert found.origins[f"caption.{name}"] == world.origins[place]
    assert found.origins["caption.model"] == "default"


def test_yaml_will_do_for_config(world):
    world.put("project", "num_beams = 2")
    world.put("--config yaml", "num_beams = 3")
    found = world.resolve()
    assert (found.values[KEY], found.origins[KEY]) == (3, f"--config {world.project / 'run.yaml'}")


def test_the_variable_names_a_profile_unless_the_option_does(world):
    for name, beams in (("fast", 2), ("slow", 9)):
        store.create_profile(name, {KEY: str(beams)})
    world.monkeypatch.setenv("DBCAP_PROFILE", "slow")
    assert world.resolve().origins[KEY] == "profile slow (named)"
    world.profile = "fast"
    assert world.resolve().values[KEY] == 2


def test_set_is_the_command_line_and_an_option_beats_it(world):
    world.put("environment", "num_beams = 2")
    world.assignments = ["num_beams=3"]  # short for caption.num_beams, within the command
    assert (world.resolve().values[KEY], world.resolve().origins[KEY]) == (3, "command line")
    world.assignments = ["caption.num-beams=3", "num_beams=4", "quiet=yes"]
    assert world.resolve().values[KEY] == 4  # the last one, as with options
    assert world.resolve().values["quiet"] is True
    world.options = {KEY: "5"}
    assert world.resolve().values[KEY] == 5
    world.assignments = ["num_beams"]
    with pytest.raises(UsageError, match="--set 'num_beams' is not of the form KEY=VALUE"):
        world.resolve()


def test_an_empty_value_is_a_value(world):
    world.put("user", 'prefix = "old"')
    world.options = {"caption.prefix": ""}
    assert world.resolve().values["caption.prefix"] == ""


def test_without_files_only_command_line_and_environment_count(world):
    world.put("user", "broken")
    world.put("environment", "num_beams = 2")
    assert resolve(Given(config="/no/such/file", profile="none"), files=False).values[KEY] == 2


# ---- complaints

FILES = {"--config": "run.toml", "--config yaml": "run.yaml", "project": "dbcap.toml", "user": "config.toml"}
FILES |= {"named": "fast.toml", "active": "daily.toml"}
NAMES = {**FILES, "environment": "DBCAP_CAPTION__", "--set": "--set", "command line": "--dtype"}


@pytest.mark.parametrize("place", ["environment", "--set", *FILES])
def test_a_misspelt_key_in_any_place_is_named_with_the_nearest(world, place):
    world.put(place, "num_beems = 4")
    with pytest.raises(ConfigError) as caught:
        world.resolve()
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert NAMES[place] in text
    assert "\n" not in text
    expected = "DBCAP_CAPTION__NUM_BEAMS" if place == "environment" else KEY
    assert text.endswith(f"did you mean {expected}?")
    assert "num_beems" in text.lower()


@pytest.mark.parametrize("place", ["command line", "environment", "--set", *FILES])
def test_a_wrong_value_in_any_place_is_named_with_what_is_allowed(world, place):
    world.put(place, 'dtype = "float23"')
    with pytest.raises(ConfigError) as caught:
        world.resolve()
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in text
    for part in (
        NAMES[place],
        "dtype",
        "'float23'",
        "one of auto, float32, bfloat16, float16",
        "did you mean float32?",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("content", "message"),
    [("profile = 5", "profile must be the name of a profile"), ("profile = 'gone'", "there is no profile gone")],
)
def test_a_wrong_active_profile_names_the_file_and_the_way_out(world, content, message):
    world.put_file("user", content)
    with pytest.raises(ConfigError) as caught:
        world.resolve()
    assert message in str(caught.value)
    assert str(paths.config_file()) in str(caught.value)
    assert "dbcap profile" in caught.value.hint


@pytest.mark.parametrize("place", ["--config", "named", "project", "active"])
def test_only_the_users_file_makes_a_profile_active(world, place):
    world.put_file(place, 'profile = "starter"')
    with pytest.raises(ConfigError, match=f"{FILES[place]}: there is no key profile; a profile is chosen by"):
        world.resolve()


def test_a_profile_that_does_not_exist_is_named_with_the_nearest(world):
    world.profile = "startr"
    with pytest.raises(ConfigError, match=r"there is no profile startr; did you mean starter\?"):
        world.resolve()
    world.profile = "x/../y"
    with pytest.raises(UsageError, match=r"'x/\.\./y' is no profile name"):
        world.resolve()


def test_a_config_file_that_does_not_exist_is_named(world):
    world.config = "absent.toml"
    with pytest.raises(ConfigError, match=r"there is no configuration file absent\.toml"):
        world.resolve()


# ---- models from settings


def test_a_section_is_built_with_its_arguments(world):
    world.put("project", "num_beams = 3")
    config = world.resolve().section(CaptionConfig, inputs=("a", "b"))
    assert (config.num_beams, config.inputs) == (3, ("a", "b"))
    world.options = {"quiet": True}
    assert world.resolve().section(CommonConfig) == CommonConfig(quiet=True)


def test_a_combination_that_cannot_work_tells_where_its_parts_come_from(world):
    world.put("user", "top_p = 0.5")
    with pytest.raises(ConfigError) as caught:
        world.resolve().section(CaptionConfig, inputs=("a",))
    assert str(caught.value) == f"--top-p needs --sample; caption.top_p comes from {paths.config_file()}"
    world.put("user", 'template = "x"')
    with pytest.raises(
        ConfigError, match=r"--template has no \{caption\}; caption\.template comes from .*config\.toml"
    ):
        world.resolve().section(CaptionConfig, inputs=("a",))
    world.put("user", "num_beams = 1")
    world.options = {"caption.top_p": "0.5"}
    with pytest.raises(ConfigError) as caught:
        world.resolve().section(CaptionConfig, inputs=("a",))
    assert str(caught.value) == "--top-p needs --sample"  # just typed: nothing to add


def test_every_key_has_a_value_and_an_origin(world):
    found = world.resolve()
    assert list(found.values) == list(found.origins) == list(known_fields())


def test_what_was_set_for_this_run_is_told_from_what_holds_always(home, monkeypatch, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[train]\nkeep = 5\n")
    paths.config_file().parent.mkdir(parents=True, exist_ok=True)
    paths.config_file().write_text("[train]\nlr = 1e-3\n")
    monkeypatch.setenv("DBCAP_TRAIN__STEPS", "7")
    settings = resolve(
        Given(assignments=["train.workers=2", "caption.num_beams=3"], config=str(file), section="resume")
    )
    assert settings.given("train") == {"keep": 5, "workers": 2}
    assert (settings.values["train.lr"], settings.values["train.steps"]) == (1e-3, 7)


# ---- where the files are


def test_dbcap_home_moves_everything(home, monkeypatch, tmp_path):
    monkeypatch.setenv("DBCAP_HOME", str(tmp_path / "elsewhere"))
    places = (paths.config_file(), paths.profiles_dir(), paths.data_dir(), paths.cache_dir())
    assert all(place.is_relative_to(tmp_path / "elsewhere") for place in places)
    monkeypatch.setenv("DBCAP_HOME", "~/own")
    assert paths.config_file() == Path(os.environ["HOME"]) / "own" / "config.toml"
    monkeypatch.setenv("DBCAP_HOME", "relative")
    assert paths.data_dir().is_absolute()


def test_without_it_the_systems_folders_are_used(home, monkeypatch):
    monkeypatch.delenv("DBCAP_HOME")
    assert paths.config_file() == Path(os.environ["XDG_CONFIG_HOME"]) / "dbcap" / "config.toml"
    assert paths.cache_dir() == Path(os.environ["XDG_CACHE_HOME"]) / "dbcap"
    assert paths.data_dir() == Path(os.environ["XDG_DATA_HOME"]) / "dbcap"


@pytest.mark.parametrize(
    "make", [Path.mkdir, lambda path: path.symlink_to(path), lambda path: path.symlink_to("/dev/zero")]
)
def test_a_settings_file_that_is_none_is_not_passed_over(make, home):
    paths.config_file().parent.mkdir(parents=True, exist_ok=True)
    make(paths.config_file())
    with pytest.raises(ConfigError, match=r"config\.toml is no file"):
        resolve(Given())


def test_a_place_that_makes_a_choice_outdoes_all_of_a_weaker_one(world):
    world.put_file("user", '[export]\nlora = "kohya"\nfp32 = false\n')
    world.put_file("project", "[export]\nint8 = true\n")
    found = world.resolve()
    assert (found.values["export.lora"], found.origins["export.lora"]) == (None, "default")
    assert found.values["export.int8"] is True
    assert found.values["export.fp32"] is False
    world.put_file("project", "[export]\nint8 = false\n")
    assert world.resolve().values["export.lora"] == "kohya"
