"""Captioners on transformers: one object per model, which states what it can do and captions batches of pixels."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError, safe_open

from dbcap.captioning.decoding import Decoding
from dbcap.captioning.engines.decoders import BUILDERS
from dbcap.captioning.engines.torch import TorchEngine
from dbcap.captioning.search import MIN_ROWS, Found, Special
from dbcap.captioning.search import search as run_search
from dbcap.errors import DbcapError, ModelError, UsageError
from dbcap.events import Events
from dbcap.models.device import Choice
from dbcap.plugins.api import Candidate, Capabilities, Captioner, CaptionerFactory

if TYPE_CHECKING:
    from dbcap.models.hub import LocalModel


class TransformersCaptioner:
    """An encoder-decoder captioner (`VisionEncoderDecoderModel`), and the base of the other transformers classes."""

    auto_class: Any = transformers.VisionEncoderDecoderModel
    prompts = False

    def __init__(self, local: LocalModel, device: str, dtype: str) -> None:
        folder = str(local.folder)
        self.name = local.spec.text
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype)
        self._local = local
        self._model, self.unused = self._load()
        self._engine: TorchEngine | None = None
        self.config = self._model.config
        self._generation = self._base_generation_config()
        with _clear_errors(self.name):
            # Another installed backend (torchvision) would resize to slightly different pixels.
            self._processor = transformers.AutoImageProcessor.from_pretrained(
                folder, backend="pil", local_files_only=True
            )
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._defaults = _decoding_defaults(local.folder)
        # They are in `_defaults` as lengths; left here, they would overrule the length that the user asks for.
        self._generation.max_new_tokens = self._generation.min_new_tokens = None

    def _load(self) -> tuple[Any, list[str]]:
        model, unused = _load_weights(self.auto_class, self._local, self.dtype)
        return model.to(self.device).eval(), unused

    @property
    def model(self) -> Any:
        """The transformers model; the engine took the weights of the first one, so it is loaded at first use."""
        if self._model is None:
            with _quiet_libraries():
                self._model, _ = self._load()
        return self._model

    def use_engine(self) -> str:
        """Hand the model to dbcap's own engine. Returns an empty string, or why that engine cannot run it."""
        if type(self) is not TransformersCaptioner:
            return f"its class is {type(self._model).__name__}"
        decoder = self.config.decoder.model_type
        if decoder not in BUILDERS:
            return f"its decoder is a {decoder}"
        if foreign := _foreign_settings(self._generation):
            return f"its generation config has {foreign[0]}"
        self._engine, self._model = TorchEngine(self._model), None
        return ""

    @property
    def capabilities(self) -> Capabilities:
        """What this model can do."""
        return Capabilities(
            beams=True, sampling=True, prompts=self.prompts, candidates=True, max_positions=self._max_positions()
        )

    def defaults(self) -> Mapping[str, Any]:
        """Return what the model's generation_config.json names, by dbcap's names."""
        return self._defaults

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise UsageError where a prompt leaves no room for a caption."""
        start = self._prompt_ids(options.get("prompt"))
        if start is not None and len(start) >= options["max_length"]:
            raise UsageError(
                f"--prompt has {len(start)} tokens with the start token, and --max-length {options['max_length']}"
                " counts them",
                "raise --max-length",
            )

    def prepare(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Resize, crop and normalise as the model's processor config says: RGB image -> float32 (3, H, W)."""
        pixels = self._processor(images=image, return_tensors="np")["pixel_values"][0]
        return np.ascontiguousarray(pixels, dtype=np.float32)

    def generate(
        self, pixels: npt.NDArray[np.float32], options: Mapping[str, Any], seeds: Sequence[int]
    ) -> list[list[Candidate]]:
        """Caption pixels (B, 3, H, W); returns B lists of `num_captions` candidates, best first."""
        found = self.search(pixels, Decoding(**options), seeds)
        return [[Candidate(self.text(one.tokens).strip(), one.score) for one in row] for row in found]

    def text(self, tokens: Sequence[int]) -> str:
        """Return what tokens spell, without the special ones and not stripped: GPT-2's end with a space at times."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    @torch.inference_mode()
    def search(self, pixels: npt.NDArray[np.float32], decoding: Decoding, seeds: Sequence[int]) -> list[list[Found]]:
        """Do what `generate` does, and return tokens instead of texts."""
        if self._engine:
            width = decoding.num_captions if decoding.sample else decoding.num_beams
            rows = self._enough_rows(pixels, width)
            more = [*seeds, *[0] * (len(rows) - len(pixels))]
            return run_search(self._engine, rows, decoding, self._special(), more)[: len(pixels)]
        with _quiet_libraries():
            if not decoding.sample:
                return self._rows(self._enough_rows(pixels, decoding.num_beams), decoding)[: len(pixels)]
            found = []
            for row, seed in zip(pixels, seeds, strict=True):
                # transformers draws from the global generator, for a batch as a whole: seeds need one image at a time.
                with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                    torch.manual_seed(seed)
                    found += self._rows(row[None], decoding)
            return found

    def _special(self) -> Special:
        start, pad, ends = self._generation.decoder_start_token_id, self._generation.pad_token_id, self._end_tokens()
        start = self._generation.bos_token_id if start is None else start
        return Special(start, tuple(ends), (ends[0] if ends else 0) if pad is None else pad)

    def _enough_rows(self, pixels: npt.NDArray[np.float32], width: int) -> npt.NDArray[np.float32]:
        """Repeat the last image until the decoder has `MIN_ROWS` rows, `width` of them an image."""
        missing = -(-MIN_ROWS // width) - len(pixels)
        if self.dtype != torch.float32 or missing <= 0:
            return pixels
        return np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)])

    def _rows(self, pixels: npt.NDArray[np.float32], decoding: Decoding) -> list[list[Found]]:
        tensor = torch.from_numpy(pixels).to(self.device, self.dtype)
        output = self.model.generate(
            **self._inputs(tensor, decoding.prompt), generation_config=self._generation_config(decoding)
        )
        scores = output.sequences_scores if decoding.num_beams > 1 else self._log_probabilities(output)
        count = decoding.num_captions
        rows = list(map(Found, map(tuple, output.sequences.tolist()), scores.float().tolist()))
        groups = [rows[start : start + count] for start in range(0, len(rows), count)]
        return [sorted(group, key=lambda c: -c.score) for group in groups]  # `sorted` is stable: ties keep their order

    def _log_probabilities(self, output: Any) -> torch.Tensor:
        """Mean log-probability of the tokens made, the end token included: what one beam would score.

        `output.logits` is T tensors (R, V), `output.sequences` (R, start + T); returns (R,).
        """
        made = output.sequences[:, -len(output.logits) :]
        chosen = torch.stack(
            [
                torch.log_softmax(step.float(), -1).gather(-1, ids[:, None])[:, 0]
                for step, ids in zip(output.logits, made.T, strict=True)
            ],
            dim=1,
        )
        ends = torch.tensor(self._end_tokens(), dtype=made.dtype, device=made.device)
        after_end = torch.isin(made, ends).int().cumsum(1).roll(1, 1)
        after_end[:, 0] = 0
        keep = (after_end == 0).float()
        return (chosen * keep).sum(1) / keep.sum(1)

    def _generation_config(self, decoding: Decoding) -> transformers.GenerationConfig:
        config = transformers.GenerationConfig.from_dict(self._generation.to_dict())
        config.return_dict_in_generate = True
        config.output_scores, config.output_logits = decoding.num_beams > 1, decoding.num_beams == 1
        neutral = {"length_penalty": 1.0, "no_repeat_ngram_size": 0, "repetition_penalty": 1.0, "min_length": 0}
        for name in ("num_beams", "max_length", "early_stopping", *neutral):
            value = getattr(decoding, name)
            setattr(config, name, neutral.get(name) if value is None else value)
        config.do_sample = decoding.sample
        config.top_k, config.top_p, config.temperature = None, None, None
        if decoding.sample:
            config.top_k = 50 if decoding.top_k is None else decoding.top_k
            config.top_p = 1.0 if decoding.top_p is None else decoding.top_p
            config.temperature = 1.0 if decoding.temperature is None else decoding.temperature
        config.num_return_sequences = decoding.num_captions
        return config

    # What the families below do in their own way.

    def _base_generation_config(self) -> transformers.GenerationConfig:
        return self._model.generation_config

    def _max_positions(self) -> int | None:
        return getattr(self.config.decoder, "max_position_embeddings", None)

    def _end_tokens(self) -> list[int]:
        ends = self._generation.eos_token_id
        return list(ends) if isinstance(ends, list) else ([] if ends is None else [ends])

    def _prompt_ids(self, prompt: str | None) -> list[int] | None:  # noqa: ARG002 - of the families with prompts
        """Return the tokens that the decoder starts with, for a family that takes prompts."""
        return None

    def _inputs(self, pixels: torch.Tensor, prompt: str | None) -> dict[str, torch.Tensor]:
        """Return the arguments of `model.generate`, for pixels (B, 3, H, W)."""
        ids = self._prompt_ids(prompt)
        if ids is None:
            return {"pixel_values": pixels}
        return {"pixel_values": pixels, "input_ids": torch.tensor([ids] * len(pixels), device=pixels.device)}


class Blip(TransformersCaptioner):
    """BLIP: a ViT and a BERT decoder with cross-attention (arXiv:2201.12086)."""

    auto_class = transformers.BlipForConditionalGeneration
    prompts = True

    def _base_generation_config(self) -> transformers.GenerationConfig:
        config = self._model.text_decoder.generation_config
        config.eos_token_id = self.config.text_config.sep_token_id
        config.pad_token_id = self.config.text_config.pad_token_id
        return config

    def _max_positions(self) -> int | None:
        return int(self.config.text_config.max_position_embeddings)

    def _prompt_ids(self, prompt: str | None) -> list[int] | None:
        start = self.config.text_config.bos_token_id
        return None if prompt is None else [start, *self.tokenizer(prompt, add_special_tokens=False).input_ids]

    def _inputs(self, pixels: torch.Tensor, prompt: str | None) -> dict[str, torch.Tensor]:
        inputs = super()._inputs(pixels, prompt)
        if "input_ids" in inputs:  # BLIP's `generate` drops the last token, the end mark of its own processor
            inputs["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (0, 1))
        return inputs


class Git(TransformersCaptioner):
    """GIT: one decoder over image and text tokens (arXiv:2205.14100)."""

    auto_class = transformers.GitForCausalLM
    prompts = True

    def _max_positions(self) -> int | None:
        return int(self.config.max_position_embeddings)

    def _prompt_ids(self, prompt: str | None) -> list[int] | None:
        start = self.tokenizer.cls_token_id
        return [start, *self.tokenizer(prompt or "", add_special_tokens=False).input_ids]


FAMILIES: dict[str, type[TransformersCaptioner]] = {
    "vision-encoder-decoder": TransformersCaptioner,
    "blip": Blip,
    "git": Git,
}
"""`model_type` of a config.json -> captioner."""


def load(local: LocalModel, choice: Choice, events: Events) -> Captioner:
    """Load a captioner. Raises ModelError for a model that is none, or that lacks weights."""
    from dbcap.plugins import loader

    kind = model_type(local.folder, local.spec.text)
    torch.set_num_threads(choice.threads)
    if kind in FAMILIES:
        captioner = FAMILIES[kind](local, choice.device, choice.dtype)
        if unused := captioner.unused:
            events.detail(f"{captioner.name}: {len(unused)} weights of the file are not used, {unused[0]} the first")
        why_not = captioner.use_engine()
        events.detail(f"decoding: transformers' generate, since {why_not}" if why_not else "decoding: dbcap's engine")
        return captioner
    if factory := loader.captioners(FAMILIES).get(kind):
        return _of_plugin(factory, kind, local, choice)
    raise ModelError(
        f"{local.spec.text} is a model of type {kind}, which captions no images here",
        f"dbcap knows {', '.join(FAMILIES)}",
    )


def _of_plugin(factory: CaptionerFactory, kind: str, local: LocalModel, choice: Choice) -> Captioner:
    try:
        return factory(local.folder, choice.device, choice.dtype)
    except DbcapError:
        raise
    except Exception as error:  # a plugin may raise anything
        raise ModelError(
            f"the plugin's captioner for models of type {kind} failed: {type(error).__name__}: {error}",
            "see `dbcap plugins doctor`, or ask the plugin's author",
        ) from error


def check(captioner: Captioner, options: Mapping[str, Any]) -> None:
    """Raise UsageError where a captioner of ours cannot work with these settled options; plugins have no such check."""
    if isinstance(captioner, TransformersCaptioner):
        captioner.check(options)


def count_parameters(folder: Path) -> int:
    """Return the number of weights of a safetensors model, from the headers of its files alone.

    Raises ModelError for a damaged file.
    """
    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "numpy") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} is damaged: {error}", "fetch or copy it again") from error
    return total


def model_type(folder: Path, name: str) -> str:
    """Return the `model_type` of a model folder."""
    try:
        kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{name} has no readable config.json: {error}") from error
    return str(kind)


def _load_weights(auto_class: Any, local: LocalModel, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """Load the model; returns it and the weights of the file that it has no place for."""
    with _clear_errors(local.spec.text):
        model, info = auto_class.from_pretrained(
            str(local.folder), dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    # The pooler of a ViT encoder is not used for captions, and many checkpoints leave it out.
    missing = sorted(key for key in info["missing_keys"] if ".pooler." not in key)
    if wrong := [*missing, *sorted(str(key) for key in info.get("mismatched_keys", ()))]:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        what = "lacks the weight" if missing else "has a weight of another shape than its config says:"
        raise ModelError(
            f"{local.spec.text} {what} {wrong[0]}{more}", "the file is incomplete, or belongs to another config.json"
        )
    return model, sorted(info["unexpected_keys"])


_OWN_SETTINGS = {
    *(field.name for field in dataclasses.fields(Decoding)),
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "do_sample", "num_return_sequences"),
    *("max_new_tokens", "min_new_tokens", "use_cache", "transformers_version"),
}


def _foreign_settings(config: transformers.GenerationConfig) -> list[str]:
    """Return the settings of a generation config that change captions and that dbcap's search does not know."""
    about_output = ("_", "output_", "return_dict")
    return [
        name
        for name, value in config.to_diff_dict().items()
        if name not in _OWN_SETTINGS
        and not name.startswith(about_output)
        # 0 and 1 leave everything as it is, but for a token and a switch
        and (value is True or value not in (None, 0, 1, [], {}) or (value is not None and name.endswith("_id")))
    ]


def _decoding_defaults(folder: Path) -> dict[str, Any]:
    """Read generation_config.json itself: the library would fill in defaults of its own, which are not the model's."""
    path = folder / "generation_config.json"
    values: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for length, made in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if values.get(made):
            values[length] = values[made] + 1  # and the start token; as in transformers it outdoes the other
    return values


@contextlib.contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    """Turn what loading raises into one line about the model."""
    with _quiet_libraries():
        try:
            yield
        except Exception as error:  # tokenizers raises that very class
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"{name} cannot be loaded: {first}") from error


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep transformers' load reports, bars and advice from the user's terminal, and restore its settings after."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(logging.CRITICAL)
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
