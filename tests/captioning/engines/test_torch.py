"""The torch engine gives transformers' own logits, keeps no image's keys twice, and steps aside where it must."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    GenerationConfig,
    GPT2Config,
    RobertaConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from dbcap.captioning.decoding import Decoding
from dbcap.captioning.engines import torch as engines
from dbcap.captioning.engines.torch import TorchEngine
from dbcap.captioning.search import Special, search
from dbcap.events import Silent
from dbcap.testing.models import write_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, WIDTH, LAYERS = 50, 32, 3
END = 1
TOKENS = {"bos_token_id": 0, "eos_token_id": END, "pad_token_id": END}
GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 80, "initializer_range": 0.25}
BERT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
    "initializer_range": 0.25,
}
KINDS: dict[str, tuple[type, dict[str, Any], int]] = {
    "gpt2": (GPT2Config, {}, WIDTH),
    "gpt2, attention scaled by layer": (GPT2Config, {"scale_attn_by_inverse_layer_idx": True}, WIDTH),
    "gpt2, attention not scaled": (GPT2Config, {"scale_attn_weights": False}, WIDTH),
    "gpt2, upcast attention": (GPT2Config, {"reorder_and_upcast_attn": True}, WIDTH),
    "gpt2, relu": (GPT2Config, {"activation_function": "relu"}, WIDTH),
    "gpt2, gelu": (GPT2Config, {"activation_function": "gelu"}, WIDTH),
    "gpt2, quick_gelu": (GPT2Config, {"activation_function": "quick_gelu"}, WIDTH),
    "gpt2, silu": (GPT2Config, {"activation_function": "silu"}, WIDTH),
    "gpt2, narrow inside": (GPT2Config, {"n_inner": 20, "layer_norm_epsilon": 0.1}, WIDTH),
    "gpt2, output of its own": (GPT2Config, {"tie_word_embeddings": False}, WIDTH),
    "gpt2 with a wider encoder": (GPT2Config, {}, 48),
    "bert": (BertConfig, {}, WIDTH),
    "bert, relu": (BertConfig, {"hidden_act": "relu"}, WIDTH),
    "bert, quick_gelu": (BertConfig, {"hidden_act": "quick_gelu", "layer_norm_eps": 0.1}, WIDTH),
    "bert, output of its own": (BertConfig, {"tie_word_embeddings": False, "type_vocab_size": 1}, WIDTH),
    "bert with a narrower encoder": (BertConfig, {}, 16),
}


def made(kind: str = "gpt2", dtype: torch.dtype = torch.float32) -> VisionEncoderDecoderModel:
    """A model with random weights; each call gives the same."""
    config, changes, width = KINDS[kind]
    text = config(
        vocab_size=VOCABULARY,
        is_decoder=True,
        add_cross_attention=True,
        **TOKENS,
        **{**(GPT2 if config is GPT2Config else BERT), **changes},
    )
    vision = ViTConfig(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        image_size=16,
        patch_size=4,
        initializer_range=0.3,
    )
    both = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)  # of the first ten the one whose captions vary in all kinds
        model = VisionEncoderDecoderModel(both)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("bias"):  # they are zero in a new model, and would hide that one is forgotten
                    weight.normal_(0, 0.3)
    model.generation_config = GenerationConfig(decoder_start_token_id=0, eos_token_id=END, pad_token_id=END)
    return model.eval().to(dtype)


def drawn(count: int, seed: int = 0) -> np.ndarray:
    """Pixels of as many images."""
    return np.random.default_rng(seed).normal(0, 1, (count, 3, 16, 16)).astype(np.float32)


def words(rows: int, length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (rows, length))


def told(engine: TorchEngine, pixels: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Feed tokens (R, T) one by one; returns log-probabilities (T, R, V)."""
    rows, length = tokens.shape
    cache = engine.encode(pixels, rows // len(pixels), length)
    every = np.tile(np.arange(VOCABULARY), (rows, 1))
    steps = [engine.step(tokens[:, place], cache, 1, every) for place in range(length)]
    return np.stack([step.watched_logprobs for step in steps])


def expected(model: Any, pixels: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The same from the whole model at once."""
    images = torch.from_numpy(np.repeat(pixels, len(tokens) // len(pixels), axis=0)).to(model.dtype)
    with torch.inference_mode():
        logits = model(pixel_values=images, decoder_input_ids=torch.from_numpy(tokens)).logits
    return torch.log_softmax(logits.float(), -1).transpose(0, 1).numpy()


def error(one: np.ndarray, two: np.ndarray) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean((one - two) ** 2)))


# ---- values


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind):
    model, pixels, tokens = made(kind), drawn(3), words(6, 10)
    wanted = expected(model, pixels, tokens)
    assert wanted.std() > 0.5, "nothing to tell apart"
    assert np.abs(np.diff(wanted[:, ::2], axis=1)).max() > 0.1, "the images make no difference"
    projects = hasattr(model, "enc_to_dec_proj")
    assert projects == (KINDS[kind][2] != WIDTH)
    assert told(TorchEngine(model), pixels, tokens) == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_those_of_generate(kind, beams):
    model, pixels = made(kind), drawn(5)
    plain = model.generate(torch.from_numpy(pixels), max_length=12, num_beams=beams, do_sample=False)
    found = search(
        TorchEngine(model), pixels, Decoding(num_beams=beams, max_length=12), Special(0, (END,), END), [0] * 5
    )
    padded = [[*row[0].tokens, *[END] * (plain.shape[1] - len(row[0].tokens))] for row in found]
    assert padded == plain.tolist()
    assert len({tuple(row) for row in padded}) > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_low_precision_is_as_near_to_the_truth_as_transformers(kind, dtype):
    """The truth is a float32 pass of the same rounded weights."""
    pixels, tokens = drawn(6), words(12, 10)
    rounded = made(kind, dtype)
    plain = expected(rounded, pixels, tokens)
    truth = expected(rounded.float(), pixels, tokens)
    found = told(TorchEngine(made(kind, dtype)), pixels, tokens)
    assert error(found, truth) < 1.25 * error(plain, truth)


def test_the_best_tokens_come_first_with_logits_and_log_probabilities():
    model, pixels, tokens = made(), drawn(4), words(4, 1)
    with torch.inference_mode():
        output = model(pixel_values=torch.from_numpy(pixels), decoder_input_ids=torch.from_numpy(tokens))
    logits = output.logits[:, -1].numpy()
    engine = TorchEngine(model)
    watched = np.array([[7, -1], [0, 3], [-1, -1], [49, 7]])
    for best in (1, 6, VOCABULARY, VOCABULARY + 9):
        found = engine.step(tokens[:, 0], engine.encode(pixels, 1, 1), best, watched)
        order = np.argsort(-logits, axis=1)[:, :best]
        assert np.array_equal(found.tokens, order)
        assert found.logits == pytest.approx(np.take_along_axis(logits, order, 1), abs=2e-5)
        assert found.logprobs == pytest.approx(np.take_along_axis(log_softmax(logits), order, 1), abs=2e-5)
        real = watched >= 0
        for values, wanted in ((found.watched_logits, logits), (found.watched_logprobs, log_softmax(logits))):
            assert values[real] == pytest.approx(np.take_along_axis(wanted, np.maximum(watched, 0), 1)[real], abs=2e-5)
        assert {array.dtype for array in found[1:]} == {np.dtype(np.float32)}
    nothing = engine.step(tokens[:, 0], engine.encode(pixels, 1, 1), 3, np.zeros((4, 0), np.int64))
    assert nothing.watched_logits.shape == nothing.watched_logprobs.shape == (4, 0)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.from_numpy(logits), -1).numpy()


# ---- mates and places


@pytest.mark.parametrize("kind", ["gpt2", "bert", "gpt2 with a wider encoder"])
@pytest.mark.parametrize("width", [1, 3])
def test_bfloat16_is_bitwise_the_same_at_every_place(kind, width):
    engine = TorchEngine(made(kind, torch.bfloat16))
    pixels, tokens = drawn(6), words(6 * width, 12)
    whole = told(engine, pixels, tokens).reshape(12, 6, width, -1)
    for order in ([5, 4, 3, 2, 1, 0], [2, 2, 2, 2, 2, 2], [0, 3, 3, 1, 5, 0]):
        mixed = told(engine, pixels[order], tokens.reshape(6, width, 12)[order].reshape(-1, 12))
        assert np.array_equal(mixed.reshape(whole.shape), whole[:, order])
    if width > 1:  # beams change places too
        turned = told(engine, pixels, tokens.reshape(6, width, 12)[:, ::-1].reshape(-1, 12))
        assert np.array_equal(turned.reshape(whole.shape), whole[:, :, ::-1])
    assert not engine.leaves


@pytest.mark.parametrize("width", [1, 4])
def test_float32_is_the_same_within_1e_5_at_every_size(width):
    engine = TorchEngine(made())
    pixels, tokens = drawn(9), words(9 * width, 12)
    whole = told(engine, pixels, tokens).reshape(12, 9, width, -1)
    for chosen in ([0, 1, 2, 3], [8, 2, 5, 1, 0], [4, 4, 4, 4, 4, 4, 4], list(range(8))):
        some = told(engine, pixels[chosen], tokens.reshape(9, width, 12)[chosen].reshape(-1, 12))
        assert some.reshape(12, len(chosen), width, -1) == pytest.approx(whole[:, chosen], abs=1e-5)
    assert engine.leaves


# ---- the cache


def bytes_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def test_the_keys_of_an_image_are_kept_once_whatever_the_number_of_beams():
    engine = TorchEngine(made())
    one, five = (engine.encode(drawn(4), width, 10) for width in (1, 5))
    places = 16 + 1
    assert bytes_of(one.cross) == bytes_of(five.cross) == 4 * 4 * places * 2 * LAYERS * WIDTH
    assert bytes_of(five.own) == 5 * bytes_of(one.own) == 4 * 20 * 10 * 2 * LAYERS * WIDTH


def test_a_cache_that_grows_is_as_good_as_one_that_is_large_from_the_start(monkeypatch):
    engine = TorchEngine(made())
    pixels, tokens = drawn(3), words(6, 70)
    found = {}
    for room in (70, 32, 3):
        monkeypatch.setattr(engines, "ROOM", room)
        found[room] = told(engine, pixels, tokens)
        assert len(engine.encode(pixels, 2, 70).own) == room
    assert np.array_equal(found[70], found[32])
    assert np.array_equal(found[70], found[3])
    assert found[70] == pytest.approx(expected(made(), pixels, tokens), abs=2e-5)


def test_long_captions_of_beams_are_those_of_generate():
    """Beyond the room at first, with rows that change places all the time."""
    model, pixels = made(), drawn(4)
    options: dict[str, Any] = {"num_beams": 4, "max_length": 75, "min_length": 70, "no_repeat_ngram_size": 2}
    plain = model.generate(torch.from_numpy(pixels), do_sample=False, **options)
    assert plain.shape[1] > 2 * engines.ROOM
    found = search(TorchEngine(model), pixels, Decoding(**options), Special(0, (END,), END), [0] * 4)
    assert [list(row[0].tokens) for row in found] == [up_to_end(row) for row in plain.tolist()]


def up_to_end(row: list[int]) -> list[int]:
    return row[: row.index(END) + 1] if END in row else row


def test_rows_change_places_where_they_are():
    engine = TorchEngine(made())
    tokens = words(8, 21)
    cache = engine.encode(drawn(2), 4, 40)
    for place in range(20):
        engine.step(tokens[:, place], cache, 1, np.zeros((8, 0), np.int64))
    rows = np.array([1, 1, 3, 0, 7, 4, 4, 5])
    before, place, cross = cache.own[: cache.used].clone(), cache.own.data_ptr(), cache.cross.data_ptr()
    engine.reorder(cache, rows)
    assert (cache.own.data_ptr(), cache.cross.data_ptr()) == (place, cross)
    assert torch.equal(cache.own[: cache.used], before[:, :, :, torch.from_numpy(rows)])
    step = engine.step(tokens[:, 20], cache, 1, np.tile(np.arange(VOCABULARY), (8, 1)))
    moved = np.concatenate([tokens[rows, :20], tokens[:, 20:]], axis=1)
    assert step.watched_logprobs == pytest.approx(expected(made(), drawn(2), moved)[-1], abs=2e-5)


def test_images_that_leave_take_their_keys_along():
    engine = TorchEngine(made())
    pixels, tokens = drawn(5), words(10, 9)
    cache = engine.encode(pixels, 2, 9)
    whole = bytes_of(cache.cross), bytes_of(cache.own)
    for place in range(8):
        engine.step(tokens[:, place], cache, 1, np.zeros((10, 0), np.int64))
    rows = np.array([2, 3, 8, 9])
    engine.reorder(cache, rows)
    assert (bytes_of(cache.cross), bytes_of(cache.own)) == (whole[0] * 2 // 5, whole[1] * 2 // 5)
    step = engine.step(tokens[rows, 8], cache, 1, np.tile(np.arange(VOCABULARY), (4, 1)))
    assert step.watched_logprobs == pytest.approx(expected(made(), pixels[[1, 4]], tokens[rows])[-1], abs=2e-5)


# ---- where transformers' `generate` stays


class Ears(Silent):
    """Hears what is said to those who ask for details."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def detail(self, message: str) -> None:
        self.told.append(message)


def loaded_and_told(load: Any, folder: Path) -> tuple[Any, str]:
    ears = Ears()
    captioner = load(folder, events=ears)
    (line,) = [line for line in ears.told if line.startswith("decoding: ")]
    return captioner, line.removeprefix("decoding: ")


def as_generate(captioner: Any, folder: Path, **options: Any) -> None:
    """Fail unless greedy captions and those of beams are those of `generate` with the model's own settings."""
    pixels = noise(4)
    model = VisionEncoderDecoderModel.from_pretrained(folder)
    ends = model.generation_config.eos_token_id
    for beams in (1, 3):
        plain = model.generate(torch.from_numpy(pixels), num_beams=beams, max_length=9, do_sample=False)
        found = captioner.search(pixels, Decoding(num_beams=beams, max_length=9), [0] * 4)
        assert [trimmed(row[0].tokens, ends) for row in found] == [trimmed(row, ends) for row in plain.tolist()]


def trimmed(row: Any, end: int) -> list[int]:
    """Without what follows the end token."""
    row = list(row)
    return row[: row.index(end, 1) + 1] if end in row[1:] else row


@pytest.fixture
def folder(tiny_captioner, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_captioner, tmp_path / "model"))


def set_generation(folder: Path, **settings: Any) -> dict[str, Any]:
    path = folder / "generation_config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps(config))
    return config


def test_the_engine_is_used_where_nothing_speaks_against_it(folder, load):
    captioner, line = loaded_and_told(load, folder)
    assert line == "dbcap's engine"
    as_generate(captioner, folder)


def test_an_unknown_decoder_is_left_to_transformers(folder, load):
    tiny = VisionEncoderDecoderModel.from_pretrained(folder)
    text = RobertaConfig(vocab_size=tiny.config.decoder.vocab_size, **BERT, is_decoder=True, add_cross_attention=True)
    both = VisionEncoderDecoderConfig.from_encoder_decoder_configs(tiny.config.encoder, text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionEncoderDecoderModel(both)
    model.generation_config = tiny.generation_config
    model.save_pretrained(folder)
    captioner, line = loaded_and_told(load, folder)
    assert line == "transformers' generate, since its decoder is a roberta"
    as_generate(captioner, folder)


def test_other_families_are_left_to_transformers(blip_captioner, git_captioner, load):
    for folder, name in ((blip_captioner, "BlipForConditionalGeneration"), (git_captioner, "GitForCausalLM")):
        assert loaded_and_told(load, folder)[1] == f"transformers' generate, since its class is {name}"


FOREIGN: list[tuple[str, Any]] = [
    ("suppress_tokens", [300, 301]),
    ("begin_suppress_tokens", [300]),
    ("forced_eos_token_id", 7),
    ("forced_eos_token_id", 0),
    ("forced_bos_token_id", 1),
    ("bad_words_ids", [[300]]),
    ("sequence_bias", [[[300], 5.0]]),
    ("renormalize_logits", True),
    ("exponential_decay_length_penalty", [3, 1.5]),
]


@pytest.mark.parametrize(("name", "value"), FOREIGN, ids=[f"{name} {value}" for name, value in FOREIGN])
def test_settings_that_the_search_does_not_know_are_left_to_transformers(folder, load, name, value):
    set_generation(folder, **{name: value})
    captioner, line = loaded_and_told(load, folder)
    as_generate(captioner, folder)
    assert line == f"transformers' generate, since its generation config has {name}"


@pytest.mark.parametrize("value", ["min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"])
def test_settings_of_sampling_that_the_search_does_not_know_are_left_to_transformers(folder, load, value):
    set_generation(folder, **{value: 0.3})
    assert loaded_and_told(load, folder)[1] == f"transformers' generate, since its generation config has {value}"


def test_settings_that_change_nothing_leave_the_engine_in_use(folder, load):
    neutral = {
        "suppress_tokens": None,
        "begin_suppress_tokens": [],
        "encoder_repetition_penalty": 1.0,
        "encoder_no_repeat_ngram_size": 0,
        "diversity_penalty": 0.0,
        "num_beam_groups": 1,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "renormalize_logits": False,
        "remove_invalid_values": False,
        "output_scores": True,
        "return_dict_in_generate": True,
        "bos_token_id": 5,
    }
    set_generation(folder, **neutral)
    assert loaded_and_told(load, folder)[1] == "dbcap's engine"


def noise(count: int = 8) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1, (count, 3, 32, 32)).astype(np.float32)


def test_several_end_tokens_and_a_start_token_of_its_own(folder, load):
    end, decoding = set_generation(folder)["eos_token_id"], Decoding(max_length=9)
    plain = [row[0].tokens for row in load(folder).search(noise(), decoding, [0] * 8)]
    image, greedy = next((i, row) for i, row in enumerate(plain) if row[4] not in row[:4])
    set_generation(folder, eos_token_id=[greedy[4], end])
    captioner, line = loaded_and_told(load, folder)
    assert line == "dbcap's engine"
    assert captioner.search(noise(), decoding, [0] * 8)[image][0].tokens == greedy[:5]
    set_generation(folder, eos_token_id=end, decoder_start_token_id=greedy[1])
    captioner, _ = loaded_and_told(load, folder)
    as_generate(captioner, folder)
    assert captioner.search(noise(), decoding, [0] * 8)[image][0].tokens[0] == greedy[1]


# ---- the model afterwards


def test_the_model_can_still_be_had(folder, load):
    captioner = load(folder)
    pixels = noise(4)
    captions = captioner.search(pixels, Decoding(max_length=9), [0] * 4)
    model = captioner.model
    plain = model.generate(torch.from_numpy(pixels), num_beams=1, max_length=9, do_sample=False)
    end = captioner.config.eos_token_id
    assert [trimmed(row[0].tokens, end) for row in captions] == [trimmed(row, end) for row in plain.tolist()]
    assert captioner.model is model
    assert captioner.search(pixels, Decoding(max_length=9), [0] * 4) == captions, "the engine goes on"


@pytest.mark.parametrize("decoder", ["gpt2", "bert"])
def test_the_engine_releases_the_weights_that_it_packs(decoder, tmp_path):
    """So that no two copies of them are in memory."""
    model = VisionEncoderDecoderModel.from_pretrained(write_tiny(tmp_path / "model", "vit", decoder))
    before = sum(weight.numel() for weight in model.parameters())
    engine = TorchEngine(model)
    after = sum(weight.numel() for weight in model.parameters())
    embeddings = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Embedding))
    assert after < before - embeddings
    assert engine.leaves
