"""Stable Diffusion 1.x and 2.x: latent diffusion with a CLIP text encoder (arXiv:2112.10752)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel

from dbcap.errors import ModelError, UsageError
from dbcap.models import denoiser, embeddings, lora, parts, tensors
from dbcap.models.embeddings import Embedding, added_words
from dbcap.models.families.description import Description
from dbcap.models.families.original import OriginalWeights, to_original, unet_names
from dbcap.models.libraries import clear_errors, compile_module
from dbcap.models.lora import Lora
from dbcap.models.mapped import MappedWeights, trim
from dbcap.models.pipelines import IDENTITY, small_in, weight_files
from dbcap.models.safety import SafetyChecker
from dbcap.models.single_file import FILES

if TYPE_CHECKING:
    from dbcap.models.hub import LocalModel
    from dbcap.models.trained import Addition


@dataclass(frozen=True)
class Condition:
    """What the denoiser is told about one prompt, or, each shape with a first axis more, about a batch of them."""

    states: torch.Tensor
    """(S, C): of every token; S is a multiple of the tokenizer's length."""
    added: dict[str, torch.Tensor] = field(default_factory=dict)
    """What a family adds, by the name that its UNet knows, each (X,)."""


class StableDiffusion(Description):
    """A pipeline in a folder. Its parts are loaded when they are first used, and the text encoder can be let go."""

    text_parts: tuple[tuple[str, str, Any], ...] = (("tokenizer", "text_encoder", CLIPTextModel),)
    """Tokenizer, encoder and its class."""

    def __init__(self, local: LocalModel, device: str, dtype: str) -> None:
        super().__init__(local)
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        self._encoders: list[Any] | None = None
        self._files: list[MappedWeights] = []
        self._compiles = False
        self._loras: list[Lora] = []
        self._embeddings: list[Embedding] = []

    def add(self, one: Addition) -> None:
        """Take a LoRA or embedding file, before a part is loaded. Raises UsageError for one that does not fit."""
        if one.embedding:
            self.add_embedding(one.path)
        else:
            self.add_lora(one.path, one.scale)

    def add_lora(self, path: Path, scale: float) -> None:
        """Take a LoRA file, before a part is loaded. Raises UsageError for one that does not fit."""
        has = {"unet": True, **{encoder: True for _, encoder, _ in self.text_parts}}
        self._loras.append(lora.read(path, scale, has))

    def add_embedding(self, path: Path) -> None:
        """Take a file with a new word, before a part is loaded. Raises UsageError for one that does not fit."""
        one = embeddings.read(path, len(self.text_parts))
        for tokenizer in self.tokenizers:
            one.teach(tokenizer)
        self._embeddings.append(one)

    @property
    def added_to(self) -> list[str]:
        """The parts that are not as the model's files have them."""
        changed = {part for one in self._loras for part in one.parts}
        if self._embeddings:
            changed |= {encoder for _, encoder, _ in self.text_parts}
        return sorted(changed)

    # ---- text

    @cached_property
    def tokenizers(self) -> list[Any]:
        """The tokenizers, the first of which counts."""
        return [self._tokenizer(tokenizer, encoder) for tokenizer, encoder, _ in self.text_parts]

    def _tokenizer(self, part: str, encoder: str) -> Any:
        most = self.config(encoder)["max_position_embeddings"]
        with clear_errors(self._called(part)):
            found = AutoTokenizer.from_pretrained(self.folder / part, local_files_only=True)
        length, path = found.model_max_length, self.folder / part / "tokenizer_config.json"
        if type(length) is not int or not 2 < length <= most:  # where it says nothing, it is 1e30
            wrong = f"it needs a model_max_length from 3 to {most}, which the {encoder} reads"
        elif None in (found.bos_token_id, found.eos_token_id, found.pad_token_id):
            wrong = "it needs a bos_token, an eos_token and a pad_token"
        else:
            return found
        raise ModelError(f"{path} is damaged: {wrong}", "fetch or copy the model again")

    @property
    def room(self) -> int:
        """Tokens of a prompt, without the marks of its beginning and end."""
        return int(self.tokenizers[0].model_max_length) - 2

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a prompt without its marks, however many."""
        return self._ids(self.tokenizers[0], text)

    def _ids(self, tokenizer: Any, text: str) -> list[int]:
        text = embeddings.written_out(text, tokenizer)
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def text_of(self, tokens: Sequence[int]) -> str:
        """Return what tokens spell."""
        return str(self.tokenizers[0].decode(list(tokens), skip_special_tokens=True)).strip()

    @torch.inference_mode()
    def encode(self, text: str, chunks: int, size: tuple[int, int]) -> Condition:
        """Encode a prompt in exactly `chunks` pieces of the tokenizer's length; what does not fit is left out.

        `size` is the picture's width and height, which some families tell the denoiser.
        """
        rows = self.token_rows(text, chunks)
        told = self.tell(self._text_encoders(), rows, size)
        return Condition(told.states.flatten(0, 1), {name: value[0] for name, value in told.added.items()})

    def tell(self, encoders: Sequence[Any], rows: Sequence[torch.Tensor], size: tuple[int, int]) -> Condition:  # noqa: ARG002 - XL's needs it
        """Run text encoders over token rows, one (B, L) for each encoder -> states (B, L, C), additions (B, X)."""
        return Condition(encoders[0](rows[0]).last_hidden_state)

    def token_rows(self, text: str, chunks: int) -> list[torch.Tensor]:
        """Return the tokens of a prompt for each text encoder: (chunks, L), marks and padding included."""
        return [self._rows(tokenizer, text, chunks) for tokenizer in self.tokenizers]

    def _rows(self, tokenizer: Any, text: str, chunks: int) -> torch.Tensor:
        length = int(tokenizer.model_max_length)
        ids = self._ids(tokenizer, text)
        start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        rows = []
        for number in range(chunks):
            part = ids[number * (length - 2) : (number + 1) * (length - 2)]
            rows.append([start, *part, end, *[pad] * (length - 2 - len(part))])
        return torch.tensor(rows, device=self.device)

    def _text_encoders(self) -> list[Any]:
        if self._encoders is None:
            self._encoders = [self.plain(encoder, self.dtype) for _, encoder, _ in self.text_parts]
        return self._encoders

    def release_text(self) -> None:
        """Let the text encoders go: a run encodes its prompts once, before anything else."""
        self._encoders = None
        trim()

    # ---- pictures

    @cached_property
    def unet(self) -> Any:
        """The denoiser."""
        model = self.plain("unet", self.dtype)
        if self.device.type == "cpu" and not self._compiles:  # the compiler packs layers itself
            denoiser.speed_up(model, self._release)
        model = model.to(memory_format=torch.channels_last)
        self._release()
        return model

    def module(self, part: str, dtype: torch.dtype) -> Any:
        """Return a denoiser or text encoder of its own, as the library defines it, to be trained: nothing is packed.

        Its weights are copies, without gradients yet.
        """
        model = self._plain(part, self._kinds[part], dtype)
        with torch.no_grad():
            for parameter in model.parameters():  # the file's pages are nobody's to write to
                parameter.data = parameter.data.clone(memory_format=torch.preserve_format)
        self._release()
        return model.to(memory_format=torch.channels_last) if part == "unet" else model

    @property
    def _kinds(self) -> dict[str, Any]:
        """The parts with weights of their own, and their classes."""
        texts = {encoder: kind for _, encoder, kind in self.text_parts}
        return {"unet": UNet2DConditionModel, "vae": AutoencoderKL, **texts}

    def plain(self, part: str, dtype: torch.dtype | None = None) -> Any:
        """Return a part as the library defines it, with what was added to it; in the file's number format if None.

        Its weights are the file's own where nothing was added to them, and not to be written to.
        """
        model = self._plain(part, self._kinds[part], dtype)
        names = unet_names(model) if part == "unet" and self._loras else {}
        for one in self._loras:
            one.merge(part, model, names)
        for place, (_, encoder, _) in enumerate(self.text_parts):
            for new in self._embeddings:
                if encoder == part:
                    new.give(place, self.tokenizers[place], model)
        return model

    def _plain(self, part: str, kind: Any, dtype: torch.dtype | None) -> Any:
        """Load a part on the device, as its files have it."""
        weights, called = self._weights(part), self._called(part)
        dtype = dtype or weights.dtype
        if part in ("unet", "vae"):
            model = parts.diffusers_model(kind, self.config(part), weights, called, dtype)
        else:
            model = parts.transformers_model(kind, self.folder / part, weights, called, dtype)
        return model.to(self.device)

    def _weights(self, part: str) -> MappedWeights:
        """Open the weights of a part."""
        with clear_errors(self.name):
            if self._local.single:
                weights: MappedWeights = OriginalWeights(self._local.single, part, self.config(part))
            else:
                weights = MappedWeights(weight_files(self.folder / part))
        self._files.append(weights)
        return weights

    def _called(self, part: str) -> str:
        return f"the {part} of {self.name}"

    def _release(self) -> None:
        """Give the memory of weight files back, of what was copied from them or can be read again."""
        for one in self._files:
            one.release()

    @cached_property
    def vae(self) -> Any:
        """The autoencoder. In float16 SDXL's overflows, so there it runs in float32, as its config asks."""
        upcast = self.dtype == torch.float16 and self.vae_config["force_upcast"]
        dtype = torch.float32 if upcast else self.dtype
        return self.plain("vae", dtype).to(memory_format=torch.channels_last)

    @cached_property
    def safety(self) -> SafetyChecker | None:
        """The safety checker; None where there is none, as in XL and in single files."""
        if not self.has_checker:
            return None
        return SafetyChecker(self.folder, self.name, self.device, self._weights)

    def check(self) -> None:
        """Raise ModelError where a weight file that is in use was written to."""
        for one in self._files:
            one.check()

    def compile(self) -> None:
        """Have torch.compile compile the denoiser at its first use. Before the denoiser is used."""
        self._compiles = True
        compile_module(self.unet)

    def save_memory(self) -> None:
        """Decode in tiles: slower, and in less memory.

        Attention needs no slices: torch's kernels and `denoiser.Attend` never hold all scores. diffusers' slices took
        more memory: one level of SD's UNet at 96x96 latents, float32, 1.2 GB without, 1.5 and 3.5 with max and auto.
        """
        self.vae.enable_tiling()

    @property
    def original_kind(self) -> str:
        """Which of the original layouts it has: "sd1" or "sd2", by whose text encoder it is, CLIP's or OpenCLIP's."""
        return "sd1" if self.config("text_encoder").get("hidden_act") == "quick_gelu" else "sd2"

    def write_single_file(
        self, path: Path, half: bool = False, header: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Write the model, with LoRA merged, as one file; with its configs and tokenizers in the header.

        Numbers stay as they are, but for sums with a LoRA, which are float32; or all become float16. Raises ModelError
        for a part that such files have no place for and for a weight too large for float16, UsageError for words that
        were added, OSError where it cannot be written.
        """
        if self._embeddings:
            one = self._embeddings[0].path
            raise UsageError(f"a single file has no place for the word of {one}", f"give {one} to users beside it")
        if words := [word for one in self.tokenizers for word in added_words(one)]:
            raise UsageError(f"a single file has no place for the word {words[0]} of {self.name}", "--diffusers has")
        dtypes = dict.fromkeys(self.added_to, torch.float32)
        states = {part: self.plain(part, dtypes.get(part)).state_dict() for part in self._kinds}
        state = to_original(self.original_kind, {part: self.config(part) for part in states}, states)
        files = {name: (self.folder / name).read_text("utf-8") for name in small_in(self.folder)}
        if self._local.trained:
            files[IDENTITY] = json.dumps(self._local.trained.identity.document())
        if half:
            state = {name: tensors.halved(one, f"{name} of {self.name}") for name, one in state.items()}
        tensors.save_file(state, path, {"format": "pt", FILES: json.dumps(files), **header})

    def predict(self, latents: torch.Tensor, time: torch.Tensor, conditions: Sequence[Condition]) -> torch.Tensor:
        """Run the denoiser: latents (B, C, H, W) float32, B conditions of one length -> (B, C, H, W) float32."""
        states = torch.stack([one.states for one in conditions])
        added = {name: torch.stack([one.added[name] for one in conditions]) for name in conditions[0].added}
        return self.denoise(self.unet, latents, time, Condition(states, added))

    def denoise(self, unet: Any, latents: torch.Tensor, time: torch.Tensor, told: Condition) -> torch.Tensor:
        """Run a denoiser: latents (B, C, H, W), times (B,) or one for all, states (B, S, C) -> (B, C, H, W) float32."""
        given = latents.to(self.dtype, memory_format=torch.channels_last)
        states, added = told.states.to(self.dtype), {name: one.to(self.dtype) for name, one in told.added.items()}
        sample: torch.Tensor = unet(
            given, time.to(self.device), encoder_hidden_states=states, added_cond_kwargs=added or None
        ).sample
        return sample.float()

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents (C, H, W) -> RGB uint8 (height, width, 3) on the CPU. One alone, so that none has mates."""
        scaled = latents[None] / self.vae_config["scaling_factor"]
        if shift := self.vae_config.get("shift_factor"):
            scaled = scaled + shift
        given = scaled.to(self.vae.dtype, memory_format=torch.channels_last)
        picture = self.vae.decode(given).sample[0].float()
        return ((picture / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu()

    def encode_picture(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode RGB uint8 (height, width, 3) -> latents (C, H, W) float32: the mean, so that nothing is drawn."""
        return self.encode_distribution(pixels)[0]

    @torch.inference_mode()
    def encode_distribution(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode RGB uint8 (height, width, 3) -> mean and deviation of its latents, each (C, H, W) float32."""
        given = (pixels.permute(2, 0, 1)[None].float() / 127.5 - 1).to(self.device, self.vae.dtype)
        found = self.vae.encode(given.contiguous(memory_format=torch.channels_last)).latent_dist
        mean, deviation = found.mean[0].float(), found.std[0].float()
        if shift := self.vae_config.get("shift_factor"):
            mean = mean - shift
        factor = self.vae_config["scaling_factor"]
        return mean * factor, deviation * factor
