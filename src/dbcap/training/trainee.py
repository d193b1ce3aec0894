"""What a method trains: the modules, their trained weights, and how captions and predictions come from them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dbcap.config.training import TrainConfig
from dbcap.errors import UsageError
from dbcap.models.families.sd import Condition, StableDiffusion
from dbcap.models.identity import Identity
from dbcap.training import adapters, kernels
from dbcap.training.optimizer import Weights

UNET, ADAPTER = "unet", "adapter"


@dataclass(frozen=True)
class How:
    """What all methods are told."""

    trains_text: bool
    keeps_base: bool
    """Whether `base_prediction` is asked."""
    accumulates: bool
    dtype: torch.dtype
    """Number format of what the forward pass reads of trained weights."""
    checkpoints: bool
    """Whether parts of the forward pass are computed twice, to save memory (arXiv:1604.06174)."""


class Trainee:
    """The model in training; a method is a subclass. What is not trained holds no gradients, and leaves memory.

    `captions` are all that a run shows, by number.
    """

    def __init__(self, family: StableDiffusion, captions: Sequence[str], size: int, dtype: torch.dtype) -> None:
        """Load the parts in a number format."""
        self.family, self._size = family, (size, size)
        self.unet: Any = family.module(UNET, dtype)
        self.encoders: dict[str, Any] = {name: family.module(name, dtype) for _, name, _ in family.text_parts}
        self._rows = [family.token_rows(caption, 1) for caption in captions]
        self._cached: Condition | None = None
        self._base: Condition | None = None
        self.weights: Weights
        self.headers: dict[str, dict[str, str]] = {}
        """Of files of weights, by their part."""

    def begin(self, working: dict[str, nn.Parameter], how: How, dtype: torch.dtype) -> None:
        """Take what is trained, by name, and the number format that modules get of it.

        All captions are encoded now, once, where text encoders are not trained.
        """
        self.weights = Weights(working, dtype, accumulates=how.accumulates)
        if not how.trains_text:
            self._cached = self.cached()
            self.encoders = {}
        if how.checkpoints:
            self.unet.enable_gradient_checkpointing()
            for encoder in self.encoders.values():
                encoder.activation_checkpointing_enable()
        kernels.speed_up(self.unet)
        for module in self.modules.values():
            module.train()

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The parts in memory, by name."""
        return {UNET: self.unet, **self.encoders}

    def tell(self, captions: torch.Tensor) -> Condition:
        """Encode captions by number, (R,) -> states (R, S, C) and additions (R, X), with gradients if trained."""
        if self._cached is not None:
            return _rows_of(self._cached, captions)
        rows = [
            torch.cat([self._rows[number][place] for number in captions.tolist()])
            for place in range(len(self.encoders))
        ]
        return self.family.tell(list(self.encoders.values()), rows, self._size)

    @torch.no_grad()
    def cached(self) -> Condition:
        """Encode all captions as the encoders are now."""
        told = [self.tell(torch.tensor([number])) for number in range(len(self._rows))]
        added = {name: torch.cat([one.added[name] for one in told]) for name in told[0].added}
        return Condition(torch.cat([one.states for one in told]), added)

    def predict(self, noisy: torch.Tensor, times: torch.Tensor, told: Condition) -> torch.Tensor:
        """Return the denoiser's prediction (R, C, h, w) float32."""
        return self.family.denoise(self.unet, noisy, times, told)

    @torch.no_grad()
    def base_prediction(self, noisy: torch.Tensor, times: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        """Return what the model predicted before it was trained (R, C, h, w) float32; `How.keeps_base` says so."""
        assert self._base is not None
        with self.untrained() as unet:
            return self.family.denoise(unet, noisy, times, _rows_of(self._base, captions))

    def untrained(self) -> contextlib.AbstractContextManager[Any]:
        """Give the denoiser as it was before."""
        return contextlib.nullcontext(self.unet)


class Full(Trainee):
    """The whole denoiser, and the text encoders."""

    def __init__(self, family: StableDiffusion, captions: Sequence[str], size: int, how: How) -> None:
        super().__init__(family, captions, size, torch.float32)
        self._base = self.cached() if how.keeps_base else None
        trained = self.modules if how.trains_text else {UNET: self.unet}
        working = {f"{part}.{name}": one for part, module in trained.items() for name, one in module.named_parameters()}
        self.begin(working, how, how.dtype)
        if how.keeps_base:
            _ = family.unet  # a copy that stays as it is, and is made fast for that

    def untrained(self) -> contextlib.AbstractContextManager[Any]:
        """Give the copy that is not trained."""
        return contextlib.nullcontext(self.family.unet)


class Lora(Trainee):
    """Pairs of small matrices beside the layers (arXiv:2106.09685)."""

    def __init__(
        self, family: StableDiffusion, captions: Sequence[str], size: int, how: How, config: TrainConfig
    ) -> None:
        super().__init__(family, captions, size, how.dtype)
        self._base = self.cached() if how.keeps_base else None
        trained = self.modules if how.trains_text else {UNET: self.unet}
        for part, module in trained.items():
            adapters.add_lora(module, part, config.rank, config.alpha or config.rank, config.targets, config.seed)
        self.headers = {ADAPTER: adapters.lora_header(trained)}
        working = {
            f"{ADAPTER}.{part}.{name}": one
            for part, module in trained.items()
            for name, one in adapters.lora_parameters(module).items()
        }
        self.begin(working, how, torch.float32)

    @contextlib.contextmanager
    def untrained(self) -> Iterator[Any]:
        """Give the denoiser without its LoRA."""
        with adapters.switched_off([self.unet]):
            yield self.unet


class NewWord(Trainee):
    """One vector, of a new word (arXiv:2208.01618). Captions of the class do not hold it: there is no prior to keep."""

    def __init__(
        self, family: StableDiffusion, captions: Sequence[str], size: int, how: How, word: str, class_word: str
    ) -> None:
        super().__init__(family, [], size, how.dtype)
        if len(self.encoders) > 1:
            raise UsageError("an embedding of a model with two text encoders is not trained", "use --method lora")
        (encoder,) = self.encoders.values()
        new = adapters.add_word(encoder, family.tokenizers[0], word, class_word)
        self._rows = [family.token_rows(caption, 1) for caption in captions]
        self.unet.requires_grad_(False)
        self.begin({f"{ADAPTER}.{word}": new.vector}, how, torch.float32)


def make(
    family: StableDiffusion, captions: Sequence[str], size: int, how: How, config: TrainConfig, identity: Identity
) -> Trainee:
    """Return what `--method` names; a new word begins as the class word of `identity`."""
    if config.method == "full":
        return Full(family, captions, size, how)
    if config.method == "lora":
        return Lora(family, captions, size, how, config)
    assert identity.class_word
    assert identity.identifier
    return NewWord(family, captions, size, how, identity.identifier, identity.class_word)


def _rows_of(told: Condition, captions: torch.Tensor) -> Condition:
    return Condition(told.states[captions], {name: value[captions] for name, value in told.added.items()})
