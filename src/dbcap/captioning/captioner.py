"""Captioners on transformers: one object per model, which states what it can do and captions batches of pixels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import torch
import transformers
from PIL import Image

from dbcap.captioning.decoding import Decoding
from dbcap.captioning.engines.decoders import BUILDERS
from dbcap.captioning.engines.torch import TorchEngine
from dbcap.captioning.failures import model_errors
from dbcap.captioning.loading import Loaded, foreign_settings, load_weights
from dbcap.captioning.search import Found, Special, enough_rows
from dbcap.captioning.search import search as run_search
from dbcap.captioning.settings import positions_of, refuse_unknown, special_tokens
from dbcap.errors import DbcapError, ModelError, UsageError
from dbcap.events import Events
from dbcap.models.device import Choice
from dbcap.models.layout import choose_in, count_in
from dbcap.models.libraries import clear_errors, compile_module, compiler_errors, quiet_libraries
from dbcap.models.mapped import MappedWeights
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
        loaded = self._load()
        self._model, self.unused = loaded.model, loaded.unused
        self._weights: MappedWeights | None = loaded.weights
        self._defaults = loaded.defaults
        self._engine: TorchEngine | None = None
        self.config = self._model.config
        self._generation = self._generation_config_of(self._model)
        with clear_errors(self.name):
            # Another installed backend (torchvision) would resize to slightly different pixels.
            self.image_processor = transformers.AutoImageProcessor.from_pretrained(
                folder, backend="pil", local_files_only=True
            )
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    @classmethod
    def around(cls, model: Any, tokenizer: Any, image_processor: Any, device: str) -> Self:
        """Return a captioner of a transformers model that is loaded already: moved to `device`, else as it is."""
        captioner = cls.__new__(cls)
        captioner.name, captioner.config = type(model).__name__, model.config
        captioner.device, captioner.dtype = torch.device(device), model.dtype
        captioner._model, captioner._engine, captioner._weights = model.to(device).eval(), None, None
        captioner.image_processor, captioner.tokenizer = image_processor, tokenizer
        captioner._generation = captioner._generation_config_of(model)
        captioner._defaults = model.generation_config.to_diff_dict()
        return captioner

    def _load(self) -> Loaded:
        loaded = load_weights(self.auto_class, self._local.folder, self.name, self.dtype)
        config = self._generation_config_of(loaded.model)
        # They are in `_defaults` as lengths; left here, they would overrule the length that the user asks for.
        config.max_new_tokens = config.min_new_tokens = None
        loaded.model.to(self.device)
        return loaded

    @property
    def model(self) -> Any:
        """The transformers model; the engine took the weights of the first one, so it is loaded at first use."""
        if self._model is None:
            with quiet_libraries():
                self._model = self._load().model
        return self._model

    def use_engine(self) -> str:
        """Hand the model to dbcap's own engine. Returns an empty string, or why that engine cannot run it."""
        if type(self) is not TransformersCaptioner:
            return f"its class is {type(self._model).__name__}"
        decoder = self.config.decoder.model_type
        if decoder not in BUILDERS:
            return f"its decoder is a {decoder}"
        if foreign := foreign_settings(self._generation):
            return f"its generation config has {foreign[0]}"
        assert self._weights
        self._engine, self._model = TorchEngine(self._model, self._weights.release), None
        return ""

    def compile(self) -> str:
        """Have torch.compile compile the encoder at its first use. Returns an empty string, or why that is not done."""
        if self._engine:
            return self._engine.compile()
        compile_module(self._encoder())
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
        pixels = self.image_processor(images=image, return_tensors="np")["pixel_values"][0]
        return np.ascontiguousarray(pixels, dtype=np.float32)

    def generate(
        self, pixels: npt.NDArray[np.float32], options: Mapping[str, Any], seeds: Sequence[int]
    ) -> list[list[Candidate]]:
        """Caption pixels (B, 3, H, W); returns B lists of `num_captions` candidates, best first."""
        found = self.search(pixels, Decoding(**options), seeds)
        return [[Candidate(self.text(one.tokens).strip(), one.score) for one in row] for row in found]

    def text(self, tokens: Sequence[int]) -> str:
        """Return what tokens spell, without the special ones and not stripped: GPT-2's end with a space at times.

        Raises ModelError for one that the tokenizer does not know.
        """
        if isinstance(self.tokenizer, transformers.PreTrainedTokenizerBase):  # a caller's own may do nothing but decode
            refuse_unknown(tokens, self.tokenizer.convert_ids_to_tokens, self.name)
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    @torch.inference_mode()
    def search(self, pixels: npt.NDArray[np.float32], decoding: Decoding, seeds: Sequence[int]) -> list[list[Found]]:
        """Do what `generate` does, and return tokens instead of texts. Raises ModelError where it cannot."""
        if self._weights:
            self._weights.check()
        if self._engine:
            width = decoding.num_captions if decoding.sample else decoding.num_beams
            rows = self._enough_rows(pixels, width)
            more = [*seeds, *[0] * (len(rows) - len(pixels))]
            with compiler_errors():
                return run_search(self._engine, rows, decoding, self._special(), more)[: len(pixels)]
        with quiet_libraries(), model_errors(self.name), compiler_errors():
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
        return special_tokens(self._generation.to_dict())

    def _enough_rows(self, pixels: npt.NDArray[np.float32], width: int) -> npt.NDArray[np.float32]:
        return enough_rows(pixels, width) if self.dtype == torch.float32 else pixels

    def _rows(self, pixels: npt.NDArray[np.float32], decoding: Decoding) -> list[list[Found]]:
        tensor = torch.from_numpy(pixels).to(self.device, self.dtype)
        output = self.model.generate(
            **self.inputs(tensor, decoding.prompt), generation_config=self._generation_config(decoding)
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

    def _encoder(self) -> torch.nn.Module:
        return self._model.encoder

    def _generation_config_of(self, model: Any) -> transformers.GenerationConfig:
        return model.generation_config

    def _max_positions(self) -> int | None:
        return positions_of(self.config.decoder.to_dict())

    def _end_tokens(self) -> list[int]:
        return list(self._special().ends)

    def _prompt_ids(self, prompt: str | None) -> list[int] | None:  # noqa: ARG002 - of the families with prompts
        """Return the tokens that the decoder starts with, for a family that takes prompts."""
        return None

    def inputs(self, pixels: torch.Tensor, prompt: str | None) -> dict[str, torch.Tensor]:
        """Return the arguments of `model.generate`, for pixels (B, 3, H, W)."""
        ids = self._prompt_ids(prompt)
        if ids is None:
            return {"pixel_values": pixels}
        return {"pixel_values": pixels, "input_ids": torch.tensor([ids] * len(pixels), device=pixels.device)}


class Blip(TransformersCaptioner):
    """BLIP: a ViT and a BERT decoder with cross-attention (arXiv:2201.12086)."""

    auto_class = transformers.BlipForConditionalGeneration
    prompts = True

    def _encoder(self) -> torch.nn.Module:
        return self._model.vision_model

    def _generation_config_of(self, model: Any) -> transformers.GenerationConfig:
        config = model.text_decoder.generation_config
        config.eos_token_id = model.config.text_config.sep_token_id
        config.pad_token_id = model.config.text_config.pad_token_id
        return config

    def _max_positions(self) -> int | None:
        return int(self.config.text_config.max_position_embeddings)

    def _prompt_ids(self, prompt: str | None) -> list[int] | None:
        start = self.config.text_config.bos_token_id
        return None if prompt is None else [start, *self.tokenizer(prompt, add_special_tokens=False).input_ids]

    def inputs(self, pixels: torch.Tensor, prompt: str | None) -> dict[str, torch.Tensor]:
        inputs = super().inputs(pixels, prompt)
        if "input_ids" in inputs:  # BLIP's `generate` drops the last token, the end mark of its own processor
            inputs["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (0, 1))
        return inputs


class Git(TransformersCaptioner):
    """GIT: one decoder over image and text tokens (arXiv:2205.14100)."""

    auto_class = transformers.GitForCausalLM
    prompts = True

    def _encoder(self) -> torch.nn.Module:
        return self._model.git.image_encoder

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


def load(local: LocalModel, choice: Choice, events: Events, *, compiled: bool = False) -> Captioner:
    """Load a captioner; `compiled`: with torch.compile, where it is of use, and else say why not.

    Raises ModelError for a model that is none, or that lacks weights.
    """
    from dbcap.plugins import loader

    kind = model_type(local.folder, local.spec.text)
    torch.set_num_threads(choice.threads)
    if kind in FAMILIES:
        captioner = FAMILIES[kind](local, choice.device, choice.dtype)
        if unused := captioner.unused:
            events.detail(f"{captioner.name}: {len(unused)} weights of the file are not used, {unused[0]} the first")
        why_not = captioner.use_engine()
        events.detail(f"decoding: transformers' generate, since {why_not}" if why_not else "decoding: dbcap's engine")
        if compiled:
            left_out = captioner.compile()
            events.say(
                f"--compile is left out: {left_out}"
                if left_out
                else "torch.compile compiles the encoder with the first batch; that takes a while"
            )
        return captioner
    if factory := loader.captioners(FAMILIES).get(kind):
        if compiled:
            events.say(f"--compile is left out: models of type {kind} are a plugin's")
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
    try:
        choice = choose_in(folder, str(folder))
        files = [folder / name for name in choice.weights if name != choice.index]
    except ModelError:  # a plugin's model may look otherwise
        files = list(folder.glob("*.safetensors"))
    return count_in(files)


def model_type(folder: Path, name: str) -> str:
    """Return the `model_type` of a model folder."""
    try:
        kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{name} has no readable config.json: {error}") from error
    return str(kind)
