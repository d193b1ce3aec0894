"""Settings files are changed in place: nothing else in them moves, and a failure leaves the old file."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dbcap.config import store
from dbcap.config.layers import from_file, known_fields
from dbcap.errors import ConfigError

# One value for every key: as typed, and as a command sees it. A key that is added adds its line here.
VALUES = {
    "quiet": ("true", True),
    "verbose": ("yes", True),
    "progress": ("off", False),
    "log_file": ("run.log", "run.log"),
    "offline": ("1", True),
    "allow_pickle": ("false", False),
    "caption.device": ("cuda:1", "cuda:1"),
    "caption.dtype": ("bfloat16", "bfloat16"),
    "caption.batch_size": ("16", 16),
    "caption.compile": ("true", True),
    "caption.recursive": ("true", True),
    "caption.null": ("true", True),
    "caption.alpha": ("#00ff00", "#00ff00"),
    "caption.max_pixels": ("1000000", 1_000_000),
    "caption.url_timeout": ("2.5", 2.5),
    "caption.url_max_mb": ("8", 8),
    "caption.workers": ("0", 0),
    "caption.model": ("org/name@v1", "org/name@v1"),
    "caption.engine": ("onnx", "onnx"),
    "caption.prompt": ("a photo of", "a photo of"),
    "caption.num_beams": ("4", 4),
    "caption.max_length": ("20", 20),
    "caption.min_length": ("0", 0),
    "caption.length_penalty": ("-1", -1.0),
    "caption.early_stopping": ("never", "never"),
    "caption.no_repeat_ngram_size": ("3", 3),
    "caption.repetition_penalty": ("1.2", 1.2),
    "caption.sample": ("true", True),
    "caption.top_p": ("0.9", 0.9),
    "caption.top_k": ("0", 0),
    "caption.temperature": ("2e-2", 0.02),
    "caption.num_captions": ("3", 3),
    "caption.seed": (str(2**64 - 1), 2**64 - 1),
    "caption.format": ("jsonl", "jsonl"),
    "caption.output": ("out put.jsonl", "out put.jsonl"),
    "caption.with_filename": ("false", False),
    "caption.extension": (".caption", ".caption"),
    "caption.prefix": ("[x] ", "[x] "),
    "caption.suffix": ('"quoted" \\ # no comment', '"quoted" \\ # no comment'),
    "caption.template": ("{stem}: {caption}", "{stem}: {caption}"),
    "caption.replace": ('["a=b", "c="]', ("a=b", "c=")),
    "caption.resume": ("true", True),
    "caption.force": ("true", True),
    "caption.lock": ("/tmp/lock", "/tmp/lock"),
    "caption.existing": ("append", "append"),
    "caption.errors": ("errors.jsonl", "errors.jsonl"),
    "caption.on_error": ("stop", "stop"),
    "prep.device": ("cuda:1", "cuda:1"),
    "prep.model": ("starter", "starter"),
    "prep.base": ("./sd15", "./sd15"),
    "prep.size": ("768", 768),
    "prep.crop": ("smart", "smart"),
    "prep.drop_duplicates": ("true", True),
    "prep.max_pixels": ("1000000", 1_000_000),
    "prep.class_word": ("dog", "dog"),
    "prep.identifier": ("zwx", "zwx"),
    "prep.template": ("a drawing of [V] {class}", "a drawing of [V] {class}"),
    "prep.caption": ("true", True),
    "prep.captioner": ("starter", "starter"),
    "prep.class_images": ("0", 0),
    "prep.class_prompts": ('["a {class}", "prompts.txt"]', ("a {class}", "prompts.txt")),
    "prep.class_guidance": ("3", 3.0),
    "prep.class_steps": ("20", 20),
    "prep.class_dir": ("./dogs", "./dogs"),
    "prep.out": ("my-dog", "my-dog"),
    "train.device": ("cuda:1", "cuda:1"),
    "train.model": ("starter", "starter"),
    "train.base": ("./sd15", "./sd15"),
    "train.size": ("768", 768),
    "train.crop": ("smart", "smart"),
    "train.drop_duplicates": ("true", True),
    "train.max_pixels": ("1000000", 1_000_000),
    "train.class_word": ("dog", "dog"),
    "train.identifier": ("zwx", "zwx"),
    "train.template": ("a drawing of [V] {class}", "a drawing of [V] {class}"),
    "train.caption": ("true", True),
    "train.captioner": ("starter", "starter"),
    "train.class_images": ("0", 0),
    "train.class_prompts": ('["a {class}", "prompts.txt"]', ("a {class}", "prompts.txt")),
    "train.class_guidance": ("3", 3.0),
    "train.class_steps": ("20", 20),
    "train.class_dir": ("./dogs", "./dogs"),
    "train.name": ("dog-1", "dog-1"),
    "train.method": ("lora", "lora"),
    "train.train_text_encoder": ("false", False),
    "train.rank": ("16", 16),
    "train.alpha": ("8", 8.0),
    "train.targets": ("all", "all"),
    "train.steps": ("1200", 1200),
    "train.lr": ("5e-6", 5e-6),
    "train.lr_schedule": ("cosine", "cosine"),
    "train.warmup": ("50", 50),
    "train.batch_size": ("2", 2),
    "train.accumulate": ("4", 4),
    "train.seed": (str(2**64 - 1), 2**64 - 1),
    "train.optimizer": ("adamw8bit", "adamw8bit"),
    "train.weight_decay": ("0", 0.0),
    "train.clip": ("0.5", 0.5),
    "train.ema": ("true", True),
    "train.ema_decay": ("0.99", 0.99),
    "train.flip": ("true", True),
    "train.precision": ("bf16", "bf16"),
    "train.gradient_checkpointing": ("off", "off"),
    "train.workers": ("2", 2),
    "train.prior": ("prediction", "prediction"),
    "train.prior_weight": ("0.5", 0.5),
    "train.min_snr": ("5", 5.0),
    "train.offset_noise": ("0.05", 0.05),
    "train.checkpoint_every": ("50", 50),
    "train.keep": ("3", 3),
    "train.validate_every": ("0", 0),
    "train.sample_every": ("100", 100),
    "train.sample_guidance": ("3", 3.0),
    "train.tracker": ("wandb", "wandb"),
    "train.max_time": ("1h30m", "1h30m"),
    "resume.steps": ("1600", 1600),
    "resume.max_time": ("45s", "45s"),
    "resume.allow_inexact": ("true", True),
    "resume.from_": ("best", "best"),
    "resume.name": ("dog-2", "dog-2"),
    "generate.device": ("cuda:1", "cuda:1"),
    "generate.dtype": ("float16", "float16"),
    "generate.batch_size": ("auto", "auto"),
    "generate.compile": ("true", True),
    "generate.like": ("o/00000-1.png", "o/00000-1.png"),
    "generate.expand": ("true", True),
    "generate.negative": ("blurry, {bad|worse}", "blurry, {bad|worse}"),
    "generate.long_prompt": ("chunk", "chunk"),
    "generate.model": ("./my dog", "./my dog"),
    "generate.engine": ("onnx", "onnx"),
    "generate.base": ("./sd15", "./sd15"),
    "generate.lora": ('["a.safetensors:0.5", "b c.safetensors"]', ("a.safetensors:0.5", "b c.safetensors")),
    "generate.embedding": ('["dog.safetensors"]', ("dog.safetensors",)),
    "generate.low_memory": ("true", True),
    "generate.num_images": ("8", 8),
    "generate.seed": ("random", "random"),
    "generate.scheduler": ("dpm++-karras", "dpm++-karras"),
    "generate.steps": ("20", 20),
    "generate.guidance": ("3", 3.0),
    "generate.guidance_rescale": ("0.7", 0.7),
    "generate.eta": ("1", 1.0),
    "generate.width": ("512", 512),
    "generate.height": ("768", 768),
    "generate.init": ("photo.jpg", "photo.jpg"),
    "generate.strength": ("0.5", 0.5),
    "generate.mask": ("mask.png", "mask.png"),
    "generate.out": ("/srv/pictures", "/srv/pictures"),
    "generate.name": ("{prompt}-{seed:020d}", "{prompt}-{seed:020d}"),
    "generate.image_format": ("webp", "webp"),
    "generate.format": ("jsonl", "jsonl"),
    "generate.show": ("true", True),
    "generate.grid": ("grid.png", "grid.png"),
    "generate.existing": ("error", "error"),
    "generate.lock": ("/tmp/lock", "/tmp/lock"),
    "generate.dry_run": ("true", True),
    "generate.max_time": ("1h30m", "1h30m"),
    "generate.safety": ("true", True),
    "generate.on_error": ("stop", "stop"),
    "export.base": ("configs", "configs"),
    "export.onnx": ("true", True),
    "export.fp16": ("true", True),
    "export.int8": ("yes", True),
    "export.int4": ("on", True),
    "export.fp32": ("off", False),
    "export.single_file": ("true", True),
    "export.lora": ("kohya", "kohya"),
    "export.diffusers": ("true", True),
    "export.torch_bnb4": ("true", True),
    "export.torch_bnb8": ("true", True),
    "export.layout": ("optimum", "optimum"),
    "export.out": ("small", "small"),
    "export.force": ("true", True),
    "export.check": ("false", False),
    "export.check_images": ("photos", "photos"),
    "export.max_drop": ("0.05", 0.05),
    "export.calibrate": ("photos", "photos"),
}

FILE = """\
# Settings of mine
verbose   =  true   # I am curious

[caption]   # how I caption
# greedy is enough
num_beams = 1 # not 4
dtype = 'float32'


# the end
"""


def test_every_key_has_a_test_value():
    assert list(VALUES) == list(known_fields())


@pytest.mark.parametrize("key", VALUES)
def test_what_is_set_is_read_back(tmp_path, key):
    path = tmp_path / "config.toml"
    raw, value = VALUES[key]
    assert store.set_value(path, key, raw) == value
    layer = from_file(path, "x")
    assert layer.values == {key: value}
    assert type(layer.values[key]) is type(value)
    assert store.unset_value(path, key)
    assert from_file(path, "x").values == {}
    assert not store.unset_value(path, key)


def test_all_keys_together_in_one_file(tmp_path):
    path = tmp_path / "config.toml"
    for key in reversed(VALUES):
        store.set_value(path, key, VALUES[key][0])
    assert from_file(path, "x").values == {key: value for key, (_, value) in VALUES.items()}
    assert [path.read_text().count(table) for table in ("[caption]", "[generate]")] == [1, 1]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_survives(tmp_path, text):
    path = tmp_path / "config.toml"
    store.set_value(path, "caption.prefix", text)
    assert from_file(path, "x").values["caption.prefix"] == text


@pytest.mark.parametrize(
    ("key", "raw", "old", "new"),
    [
        ("caption.num_beams", "4", "num_beams = 1 # not 4", "num_beams = 4 # not 4"),
        ("verbose", "false", "verbose   =  true   #", "verbose   =  false   #"),
        ("caption.dtype", "auto", "'float32'", '"auto"'),
        ("quiet", "true", "curious\n", "curious\nquiet = true\n"),
    ],
)
def test_comments_order_and_blank_lines_stay_byte_for_byte(tmp_path, key, raw, old, new):
    path = tmp_path / "config.toml"
    path.write_text(FILE)
    store.set_value(path, key, raw)
    assert path.read_text() == FILE.replace(old, new)


def test_a_key_is_added_to_its_table_and_taken_out_again(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(FILE)
    store.set_value(path, "caption.seed", "5")
    before, _, after = path.read_text().partition("seed = 5\n")
    assert before + after == FILE
    store.unset_value(path, "caption.seed")
    assert path.read_text() == FILE


def test_line_ends_of_windows_stay(tmp_path):
    path = tmp_path / "config.toml"
    path.write_bytes(FILE.replace("\n", "\r\n").encode())
    store.set_value(path, "caption.num_beams", "4")
    assert path.read_bytes() == FILE.replace("= 1", "= 4").replace("\n", "\r\n").encode()


@pytest.mark.parametrize("content", ["caption.seed = 1\n", "caption = {seed = 1}\n", "[caption]\nseed = 1"])
def test_every_way_to_write_a_table_is_kept(tmp_path, content):
    path = tmp_path / "config.toml"
    path.write_text(content)
    store.set_value(path, "caption.num_beams", "4")
    store.set_value(path, "quiet", "true")
    assert tomllib.loads(path.read_text()) == {"quiet": True, "caption": {"seed": 1, "num_beams": 4}}
    assert store.unset_value(path, "caption.seed")
    assert tomllib.loads(path.read_text()) == {"quiet": True, "caption": {"num_beams": 4}}


def test_a_wrong_value_or_key_leaves_the_file_alone(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(FILE)
    with pytest.raises(ConfigError, match=r"config set: caption\.dtype = 'x' is not allowed: it must be one of"):
        store.set_value(path, "caption.dtype", "x")
    with pytest.raises(ConfigError, match=r"did you mean caption\.num_beams\?"):
        store.set_value(path, "caption.num_beems", "4")
    with pytest.raises(ConfigError, match=r"config unset: there is no key caption\.num_beems; did you mean"):
        store.unset_value(path, "caption.num_beems")
    assert path.read_text() == FILE


def test_a_key_that_dbcap_does_not_know_can_be_taken_out(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("[caption]\nnum_beems = 4\nnum_beams = 3\n")
    assert store.unset_value(path, "caption.num_beems")
    assert path.read_text() == "[caption]\nnum_beams = 3\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"quiet = \n", "is not valid: .* line 1"),
        (b"\xff", "is not valid"),
        (b"caption = 5\n", "caption is a table, not a value; mend it with `dbcap config edit`"),
    ],
)
def test_a_broken_file_is_not_written_over(tmp_path, content, message):
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        store.set_value(path, "caption.num_beams", "4")
    assert path.read_bytes() == content


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    path.write_text(FILE)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dbcap.files.os.fsync", full)
    with pytest.raises(ConfigError, match=f"cannot write {path}: No space left on device"):
        store.set_value(path, "caption.num_beams", "4")
    assert path.read_text() == FILE
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.toml"]


def test_the_folder_of_the_file_is_made(tmp_path):
    store.set_value(tmp_path / "a" / "b" / "config.toml", "quiet", "true")
    assert (tmp_path / "a" / "b" / "config.toml").read_text() == "quiet = true\n"


def test_a_linked_file_stays_a_link(tmp_path):
    real, link = tmp_path / "real.toml", tmp_path / "config.toml"
    real.write_text(FILE)
    link.symlink_to(real)
    store.set_value(link, "caption.num_beams", "4")
    assert link.is_symlink()
    assert "num_beams = 4" in real.read_text()


def test_the_template_is_valid_and_sets_nothing(tmp_path):
    store.write_template(tmp_path / "config.toml")
    assert from_file(tmp_path / "config.toml", "x").values == {}
    assert (tmp_path / "config.toml").read_text().startswith("# Settings of dbcap")


def test_a_value_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(FILE)
    with pytest.raises(ConfigError, match="a settings file is UTF-8, and this value is not"):
        store.set_value(path, "caption.output", "\udcff.jsonl")
    assert path.read_text() == FILE
    store.set_value(path, "caption.prefix", "gr\udcc3\udcbcn")  # what python makes of UTF-8 in the locale C
    assert from_file(path, "x").values["caption.prefix"] == "grün"
