"""A captioner says what transformers' own `generate`, called plainly, says; and loads only what is whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import OPTConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

import dbcap_starter
from dbcap.captioning import captioner
from dbcap.captioning.captioner import TransformersCaptioner
from dbcap.captioning.decoding import Decoding, settle
from dbcap.config.models import CaptionConfig
from dbcap.errors import ModelError, UsageError
from dbcap.events import Silent
from dbcap.plugins.api import Capabilities
from dbcap.testing.models import write_tiny

STARTER = Path(dbcap_starter.__file__).parent / "captioner"
PAIRS = [(encoder, decoder) for encoder in ("vit", "deit", "beit", "swin") for decoder in ("gpt2", "bert")]
GREEDY = Decoding(max_length=12)
BEAMS = Decoding(max_length=12, num_beams=4, num_captions=3)


@pytest.fixture(scope="module")
def pictures(samples) -> list[Image.Image]:
    """Eight of the samples, and pictures of other shapes."""
    random = np.random.default_rng(0)
    shapes = [(1, 1), (3, 1), (1, 3), (50, 200), (300, 100)]
    noise = [Image.fromarray(random.integers(0, 256, (*shape, 3), np.uint8)) for shape in shapes]
    return [*(Image.open(path).convert("RGB") for path in samples[:8]), *noise]


@pytest.fixture(scope="module", params=[*PAIRS, "starter"], ids=[*map("-".join, PAIRS), "starter"])
def folder(request, tmp_path_factory) -> Path:
    """A model folder of each kind."""
    if request.param == "starter":
        return STARTER
    return write_tiny(tmp_path_factory.mktemp("model") / "-".join(request.param), *request.param)


def captions(loaded: TransformersCaptioner, pictures: list[Image.Image], decoding: Decoding) -> list[list[Any]]:
    pixels = np.stack([loaded.prepare(picture) for picture in pictures])
    return loaded.generate(pixels, decoding.as_dict(), range(len(pixels)))


def said(found: list[list[Any]]) -> list[list[str]]:
    return [[candidate.text for candidate in row] for row in found]


def scored(found: list[list[Any]]) -> np.ndarray:
    return np.array([[candidate.score for candidate in row] for row in found])


# ---- against transformers


def test_captions_and_scores_are_those_of_transformers(folder, load, pictures):
    model = transformers.VisionEncoderDecoderModel.from_pretrained(folder).float()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    plain = {"do_sample": False, "return_dict_in_generate": True, "max_length": 12}
    greedy = model.generate(pixels, num_beams=1, output_logits=True, **plain)
    beams = model.generate(pixels, num_beams=4, num_return_sequences=3, output_scores=True, **plain)
    texts = [text.strip() for text in tokenizer.batch_decode(greedy.sequences, skip_special_tokens=True)]
    ranked = [text.strip() for text in tokenizer.batch_decode(beams.sequences, skip_special_tokens=True)]
    assert len(set(texts)) > 1, "the model says the same of everything: this test would prove nothing"

    loaded = load(folder)
    assert np.array_equal(np.stack([loaded.prepare(picture) for picture in pictures]), pixels.numpy())
    found = captions(loaded, pictures, GREEDY)
    assert said(found) == [[text] for text in texts]
    assert scored(found)[:, 0] == pytest.approx(mean_log_probabilities(model, pixels, greedy.sequences), abs=1e-5)
    found = captions(loaded, pictures, BEAMS)
    assert said(found) == [ranked[start : start + 3] for start in range(0, len(ranked), 3)]
    assert scored(found).ravel() == pytest.approx(beams.sequences_scores.numpy(), abs=1e-5)
    assert (np.diff(scored(found)) <= 0).all(), "best first"


def mean_log_probabilities(model: Any, pixels: torch.Tensor, sequences: torch.Tensor) -> list[float]:
    """Of the tokens up to the end token, by feeding the whole sequence at once."""
    with torch.inference_mode():
        logits = model(pixel_values=pixels, decoder_input_ids=sequences[:, :-1]).logits
    found = torch.log_softmax(logits, -1).gather(-1, sequences[:, 1:, None])[..., 0]
    means = []
    for row, ids in zip(found, sequences[:, 1:], strict=True):
        ends = (ids == model.generation_config.eos_token_id).nonzero()
        count = int(ends[0]) + 1 if len(ends) else len(ids)
        means.append(float(row[:count].mean()))
    return means


def test_every_decoding_option_reaches_the_search(tiny_captioner, load, pictures):
    model = transformers.VisionEncoderDecoderModel.from_pretrained(tiny_captioner)
    loaded = load(tiny_captioner)
    pixels = torch.from_numpy(np.stack([loaded.prepare(picture) for picture in pictures]))
    base = Decoding(max_length=14, num_beams=2)
    changes: list[dict[str, Any]] = [
        {"max_length": 5},
        {"min_length": 13},
        {"length_penalty": -3.0},
        {"no_repeat_ngram_size": 1},
        {"repetition_penalty": 5.0},
        {"num_beams": 5},
    ]
    usual = captions(loaded, pictures, base)
    for change in changes:
        options = {"max_length": 14, "num_beams": 2, **change}
        plain = model.generate(pixels, do_sample=False, **options)
        texts = [[text.strip()] for text in loaded.tokenizer.batch_decode(plain, skip_special_tokens=True)]
        found = captions(loaded, pictures, Decoding(**{**base.as_dict(), **change}))
        assert said(found) == texts, change
        assert (said(found), scored(found).tolist()) != (said(usual), scored(usual).tolist()), change


def test_the_models_own_number_of_new_tokens_gives_way(tiny_captioner, load, pictures, tmp_path):
    shutil.copytree(tiny_captioner, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_new_tokens": 9, "min_new_tokens": 2}))
    loaded = load(tmp_path / "model")
    assert {name: loaded.defaults()[name] for name in ("max_length", "min_length")} == {
        "max_length": 10,
        "min_length": 3,
    }
    short = Decoding(max_length=4)
    assert said(captions(loaded, pictures, short)) == said(captions(load(tiny_captioner), pictures, short))


# ---- sampling


def test_sampling_depends_on_the_seed_of_the_image_alone(tiny_captioner, load, pictures):
    loaded = load(tiny_captioner)
    options = Decoding(max_length=10, sample=True, num_captions=2).as_dict()
    pixels = np.stack([loaded.prepare(picture) for picture in pictures])
    seeds = list(range(100, 100 + len(pixels)))
    state = torch.get_rng_state()
    found = loaded.generate(pixels, options, seeds)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not ours"
    turned = loaded.generate(pixels[::-1].copy(), options, seeds[::-1])[::-1]
    alone = [loaded.generate(pixels[i : i + 1], options, seeds[i : i + 1])[0] for i in range(3)]
    assert said(turned) == said(found)
    assert said(alone) == said(found)[:3]
    assert scored(turned) == pytest.approx(scored(found), abs=1e-5)
    assert scored(alone) == pytest.approx(scored(found)[:3], abs=1e-5)
    other = loaded.generate(pixels, options, [seed + 1 for seed in seeds])
    assert sum(one != two for one, two in zip(said(found), said(other), strict=True)) > len(pixels) // 2
    assert all(first.score >= second.score for first, second in found)


def test_sampling_options_reach_the_draw(tiny_captioner, load, pictures):
    loaded = load(tiny_captioner)

    def drawn(seed: int, **options: Any) -> list[list[str]]:
        pixels = np.stack([loaded.prepare(picture) for picture in pictures])
        decoding = Decoding(max_length=10, sample=True, **options)
        return said(loaded.generate(pixels, decoding.as_dict(), [seed] * len(pixels)))

    greedy = said(captions(loaded, pictures, Decoding(max_length=10)))
    assert drawn(1, top_k=1) == drawn(2, top_k=1) == greedy
    assert drawn(1, top_p=1e-9) == drawn(1, temperature=1e-4) == greedy
    assert drawn(1, top_k=0) != greedy


# ---- prompts


@pytest.mark.parametrize("kind", ["blip_captioner", "git_captioner"])
@pytest.mark.parametrize("prompt", [None, "", "a photo of two cats"])
@pytest.mark.parametrize("beams", [1, 3])
def test_prompts_are_those_of_transformers(kind, prompt, beams, request, load, pictures):
    folder = request.getfixturevalue(kind)
    auto = {"blip_captioner": transformers.BlipForConditionalGeneration, "git_captioner": transformers.GitForCausalLM}
    model = auto[kind].from_pretrained(folder)
    loaded = load(folder)
    assert loaded.capabilities.prompts
    pixels = torch.from_numpy(np.stack([loaded.prepare(picture) for picture in pictures]))
    inputs = plain_inputs(kind, folder, prompt, len(pictures))
    plain = model.generate(pixel_values=pixels, max_length=14, num_beams=beams, do_sample=False, **inputs)
    texts = [[text.strip()] for text in loaded.tokenizer.batch_decode(plain, skip_special_tokens=True)]
    decoding = Decoding(max_length=14, num_beams=beams, prompt=prompt)
    loaded.check(decoding.as_dict())
    found = said(captions(loaded, pictures, decoding))
    assert found == texts
    assert len({text for (text,) in found}) > 1
    assert all(text.startswith(prompt or "") and len(text) > len(prompt or "") for (text,) in found)


def plain_inputs(kind: str, folder: Path, prompt: str | None, count: int) -> dict[str, torch.Tensor]:
    """As the model cards of BLIP and GIT have it."""
    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    if kind == "blip_captioner":
        if prompt is None:
            return {}
        return {"input_ids": processor(text=[prompt] * count, return_tensors="pt").input_ids}
    ids = [processor.tokenizer.cls_token_id, *processor(text=prompt or "", add_special_tokens=False).input_ids]
    return {"input_ids": torch.tensor([ids] * count)}


@pytest.mark.parametrize("kind", ["blip_captioner", "git_captioner"])
def test_a_prompt_that_leaves_no_room_is_refused(kind, request, load, pictures):
    loaded = load(request.getfixturevalue(kind))
    with pytest.raises(UsageError, match="--prompt has 6 tokens with the start token, and --max-length 6 counts"):
        loaded.check(Decoding(max_length=6, prompt="a photo of two cats").as_dict() | {"prompt": "a b c d e"})
    loaded.check(Decoding(max_length=7, prompt="a b c d e").as_dict())
    assert all(
        row[0].startswith("a b c d e") for row in said(captions(loaded, pictures, Decoding(7, prompt="a b c d e")))
    )


def test_capabilities(tiny_captioner, blip_captioner, git_captioner, load):
    can = Capabilities(beams=True, sampling=True, prompts=False, candidates=True, max_positions=64)
    assert load(tiny_captioner).capabilities == can
    assert load(STARTER).capabilities == can
    for folder in (blip_captioner, git_captioner):
        assert load(folder).capabilities == Capabilities(True, True, True, True, 64)


# ---- loading


@pytest.mark.parametrize("name", ["decoder.transformer.h.0.mlp.c_fc.weight", "encoder.layernorm.bias"])
def test_a_missing_weight_is_an_error_that_names_it(tiny_captioner, load, tmp_path, name):
    weights = without(tiny_captioner, tmp_path / "model", name)
    assert name not in weights
    with pytest.raises(ModelError, match="lacks the weight .*" + name.rpartition(".")[0].rpartition(".")[2]):
        load(tmp_path / "model")


def without(source: Path, target: Path, *names: str) -> dict[str, torch.Tensor]:
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    for name in names:
        del weights[name]
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return weights


def test_a_missing_pooler_is_none(tiny_captioner, load, pictures, tmp_path):
    poolers = [name for name in load_file(tiny_captioner / "model.safetensors") if ".pooler." in name]
    assert poolers
    without(tiny_captioner, tmp_path / "model", *poolers)
    found = captions(load(tmp_path / "model"), pictures, GREEDY)
    assert found == captions(load(tiny_captioner), pictures, GREEDY)


def test_weights_that_are_not_used_are_told_only_who_asks(tiny_captioner, load, tmp_path):
    shutil.copytree(tiny_captioner, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors") | {"decoder.extra": torch.zeros(3)}
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    told: list[str] = []

    class Ears(Silent):
        def detail(self, message: str) -> None:
            told.append(message)

    load(tmp_path / "model", events=Ears())
    assert "1 weights of the file are not used, decoder.extra the first" in told[0]
    assert told[1:] == ["decoding: dbcap's engine"]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", '{"model_type": "bert"}', "is a model of type bert, which captions no images here"),
        ("config.json", "{}", "model of type None|config"),
        ("config.json", "not json", "config.json"),
        ("tokenizer.json", "{}", "cannot be loaded"),
        ("preprocessor_config.json", "{", "cannot be loaded"),
        ("preprocessor_config.json", "{}", "cannot be loaded"),
        ("generation_config.json", "[]", "cannot be loaded"),
        ("model.safetensors", "garbage", "is damaged|cannot be loaded"),
    ],
)
def test_what_is_no_captioner_or_damaged_is_one_line(tiny_captioner, load, tmp_path, file, content, words):
    shutil.copytree(tiny_captioner, tmp_path / "model")
    (tmp_path / "model" / file).write_text(content)
    with pytest.raises(ModelError, match=words) as caught:
        load(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_refused(tiny_captioner, load, tmp_path):
    shutil.copytree(tiny_captioner, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["decoder"]["vocab_size"] += 1
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"cannot be loaded|another shape"):
        load(tmp_path / "model")


def test_the_number_of_parameters_is_read_from_the_headers(tiny_captioner, tmp_path):
    count = sum(tensor.numel() for tensor in load_file(tiny_captioner / "model.safetensors").values())
    assert captioner.count_parameters(tiny_captioner) == count
    assert captioner.count_parameters(tmp_path) == 0
    (tmp_path / "model.safetensors").write_bytes((tiny_captioner / "model.safetensors").read_bytes()[:100])
    with pytest.raises(ModelError, match="is damaged"):
        captioner.count_parameters(tmp_path)


def test_libraries_are_quiet_and_as_loud_as_before(tiny_captioner, load, pictures, capfd):
    before = transformers.utils.logging.get_verbosity()
    captions(load(tiny_captioner), pictures, BEAMS)
    captions(load(tiny_captioner), pictures, Decoding(max_length=8, sample=True))
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.get_verbosity() == before
    assert transformers.utils.logging.is_progress_bar_enabled()


# ---- an installed torchvision

_TORCHVISION = """
import hashlib, sys
from pathlib import Path
import numpy as np
from PIL import Image
from transformers.utils import is_torchvision_available
assert is_torchvision_available()
from dbcap.captioning.captioner import TransformersCaptioner
from dbcap.events import Silent
from dbcap.models import hub
local = hub.locate(sys.argv[1], offline=True, events=Silent(), home=Path(sys.argv[2]))
loaded = TransformersCaptioner(local, "cpu", "float32")
image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 90, 3), np.uint8))
print(type(loaded.image_processor).__name__, hashlib.sha256(loaded.prepare(image).tobytes()).hexdigest())
"""

# Can be imported, but whoever calls something of it is found out.
_FAKE = """
class Used(type):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Used.__new__(Used, name, (), {})
    def __call__(self, *args, **kwargs):
        raise RuntimeError(f"torchvision was used: {self.__name__}")

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Used.__new__(Used, name, (), {})
"""


def test_an_installed_torchvision_changes_no_pixel(tiny_captioner, load, home, tmp_path, monkeypatch):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 90, 3), np.uint8))
    expected = hashlib.sha256(load(tiny_captioner).prepare(image).tobytes()).hexdigest()
    fake = tmp_path / "site" / "torchvision"
    info = tmp_path / "site" / "torchvision-0.28.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    for name in ("", "transforms", "transforms/functional", "transforms/v2", "transforms/v2/functional", "io"):
        (fake / name).mkdir()
        (fake / name / "__init__.py").write_text(_FAKE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ['PYTHONPATH']}")
    done = subprocess.run([sys.executable, "-c", _TORCHVISION, tiny_captioner, home], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == (f"ViTImageProcessorPil {expected}\n", "")


# ---- the model's own settings


def with_settings(
    source: Path, target: Path, settings: dict[str, Any], *, file: str = "generation_config.json"
) -> Path:
    """Copy a model and change its settings; in another file than the usual one, that one is removed."""
    shutil.copytree(source, target)
    path = target / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    if file != "generation_config.json":
        (target / "generation_config.json").unlink()
    return target


def test_settings_in_config_json_are_the_models_own(tiny_captioner, load, tmp_path):
    folder = with_settings(tiny_captioner, tmp_path / "m", {"max_length": 7, "num_beams": 3}, file="config.json")
    loaded = load(folder)
    assert (loaded.defaults()["max_length"], loaded.defaults()["num_beams"]) == (7, 3)
    decoding = settle(CaptionConfig(inputs=()), loaded.defaults(), loaded.capabilities, "it")
    assert (decoding.max_length, decoding.num_beams) == (7, 3)


def test_own_lengths_that_do_not_fit_are_cut(tiny_captioner, load, pictures, tmp_path):
    positions = load(tiny_captioner).capabilities.max_positions
    for number, own in enumerate(({"max_length": positions + 9}, {"max_length": 8, "min_length": 20})):
        loaded = load(with_settings(tiny_captioner, tmp_path / f"{number}", own))
        decoding = settle(CaptionConfig(inputs=()), loaded.defaults(), loaded.capabilities, "it")
        assert decoding.max_length == min(own["max_length"], positions)
        assert (decoding.min_length or 0) <= decoding.max_length
        pixels = torch.from_numpy(np.stack([loaded.prepare(picture) for picture in pictures]))
        lengths = {"max_length": decoding.max_length, "min_length": decoding.min_length}
        theirs = loaded.model.generate(pixels, do_sample=False, **lengths)
        texts = [[text.strip()] for text in loaded.tokenizer.batch_decode(theirs, skip_special_tokens=True)]
        assert said(captions(loaded, pictures, decoding)) == texts
    with pytest.raises(UsageError, match="--max-length 999 is beyond"):
        settle(CaptionConfig(inputs=(), max_length=999), loaded.defaults(), loaded.capabilities, "it")


@pytest.mark.parametrize("settings", [{"max_length": "16"}, {"num_beams": True}, {"top_p": [1]}])
def test_own_settings_that_are_no_numbers_are_named(tiny_captioner, load, tmp_path, settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ModelError, match=rf"says {name} = {re.escape(repr(value))}, which is no number"):
        load(with_settings(tiny_captioner, tmp_path / "model", settings))


def test_own_settings_that_transformers_refuses_are_one_line(tiny_captioner, load, pictures, tmp_path):
    folder = with_settings(tiny_captioner, tmp_path / "model", {"num_beam_groups": 2, "diversity_penalty": 1.0})
    loaded = load(folder)
    with pytest.raises(
        ModelError, match=r"^transformers cannot caption with .*generation_config\.json may ask"
    ) as caught:
        captions(loaded, pictures, Decoding(num_beams=2, max_length=8))
    assert "\n" not in str(caught.value)


def test_a_decoder_that_transformers_cannot_run_is_one_line(tiny_captioner, load, pictures, tmp_path):
    """OPT takes no encoder's output, but its configuration may say that it does."""
    config = json.loads((tiny_captioner / "config.json").read_text())
    text = OPTConfig(
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=99,
        word_embed_proj_dim=32,
    )
    model = VisionEncoderDecoderModel(
        VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**config["encoder"]), text)
    )
    folder = shutil.copytree(tiny_captioner, tmp_path / "model")
    model.save_pretrained(folder)
    loaded = load(folder)
    with pytest.raises(ModelError, match=r"^transformers cannot caption with") as caught:
        captions(loaded, pictures, GREEDY)
    assert "\n" not in str(caught.value)


def test_a_model_whose_file_is_written_to_captions_nothing_more(tiny_captioner, load, pictures, tmp_path):
    shutil.copytree(tiny_captioner, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "decoder.large": torch.zeros(2**20)}, path, {"format": "pt"})  # enough to stay mapped
    loaded = load(tmp_path / "model")
    captions(loaded, pictures, GREEDY)
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="was changed while it was in use"):
        captions(loaded, pictures, GREEDY)
