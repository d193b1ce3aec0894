"""Weights that are trained, in float32, beside the copies that the forward pass reads; and the optimizer over both.

In bfloat16 an update of 1e-6 is lost in a weight of 1: half the digits are missing. So the optimizer keeps float32
weights, as mixed precision does (arXiv:1710.03740, section 3.1), and rounds them to the copies after each step. Against
autocast that saves casting all weights in each pass, and half the memory of the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dbcap.errors import DbcapError

CHUNK = 32 * 2**20
"""Parameters that one inner optimizer holds at most, beyond its first: float32 gradients exist for one at a time."""
PIECE = 2**20
"""Elements of a gradient that become float32 at once where its length is taken."""
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class DivergedError(DbcapError):
    """A gradient is no number any more."""


class Weights:
    """Trained parameters by name. `working` is what modules hold; `masters` the same in float32.

    Where a module holds float32 anyway, both are one.
    """

    def __init__(self, working: Mapping[str, nn.Parameter], dtype: torch.dtype, *, accumulates: bool) -> None:
        """Take parameters in float32; where `dtype` is less, modules get copies of it, and masters the numbers."""
        self.working, self.masters = dict(working), dict(working)
        for name, one in self.working.items():
            one.requires_grad_(True)
            if dtype != torch.float32:
                self.masters[name] = nn.Parameter(one.data.contiguous(), requires_grad=False)
                one.data = one.data.to(dtype)
                if accumulates:
                    one.register_post_accumulate_grad_hook(self._adder(self.masters[name]))

    @staticmethod
    def _adder(master: nn.Parameter) -> Callable[[torch.Tensor], None]:
        """Return a hook that moves a gradient to its master, in float32: sums of many would lose digits in less."""

        def add(working: torch.Tensor) -> None:
            assert working.grad is not None
            if master.grad is None:
                master.grad = torch.empty_like(master).copy_(working.grad)
            else:
                master.grad += working.grad
            working.grad = None

        return add

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients there are, of whatever number format."""
        found = {name: self.masters[name].grad if one.grad is None else one.grad for name, one in self.working.items()}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def forget_gradients(self, names: Iterable[str]) -> None:
        """Let the memory of gradients go."""
        for name in names:
            self.working[name].grad = self.masters[name].grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """Return the float32 weights."""
        return {name: one.detach() for name, one in self.masters.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take weights. Raises DbcapError where these are others."""
        if state.keys() != self.masters.keys():
            odd = next(iter(sorted(state.keys() ^ self.masters.keys())))
            raise DbcapError(f"the checkpoint does not belong to this model: {odd}", "choose another checkpoint")
        for name, master in self.masters.items():
            master.copy_(state[name])
        self.publish(self.masters)

    @torch.no_grad()
    def publish(self, names: Iterable[str]) -> None:
        """Round float32 weights to what the modules read."""
        for name in names:
            if self.working[name] is not self.masters[name]:
                self.working[name].copy_(self.masters[name])


class MasterOptimizer(torch.optim.Optimizer):
    """Steps the float32 weights by inner optimizers, one for each chunk, and publishes them.

    `make` returns one for a list of parameters. Gradients longer than `clip`, taken together, are shortened to it.
    """

    def __init__(self, weights: Weights, make: Make, *, lr: float, clip: float) -> None:
        super().__init__(list(weights.masters.values()), {"lr": lr})
        self.weights, self._clip = weights, clip
        self._chunks = _chunks(weights.masters)
        self._inner = [make([weights.masters[name] for name in names]) for names in self._chunks]
        self.norm = 0.0
        """Length of the last gradient, before it was clipped."""
        self.lr_used = lr
        """Learning rate of the last step."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let all gradients go."""
        assert set_to_none
        self.weights.forget_gradients(self.weights.working)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step. Raises DivergedError, before anything is changed, for a gradient that is no number."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = self.weights.gradients()
        self.norm = _norm(gradients.values())
        if not math.isfinite(self.norm):
            raise DivergedError("the gradient is not finite")
        self.lr_used = self.param_groups[0]["lr"]
        scale = min(1.0, self._clip / (self.norm + 1e-6)) if self._clip else 1.0
        room = self._room()
        for names, inner in zip(self._chunks, self._inner, strict=True):
            used = 0
            for name in [name for name in names if name in gradients]:
                master, gradient = self.weights.masters[name], gradients.pop(name)
                self.weights.working[name].grad = None
                master.grad = _like(gradient, room[used:], master)
                used += master.numel()
                if scale < 1:
                    master.grad *= scale
            for group in inner.param_groups:
                group["lr"] = self.lr_used
            inner.step()
            self.weights.publish(names)
            self.weights.forget_gradients(names)
        return loss

    def _room(self) -> torch.Tensor:
        """Return memory for the gradients of a chunk: asking for it anew takes longer than writing to it."""
        masters = self.weights.masters
        most = max(sum(masters[name].numel() for name in names) for names in self._chunks)
        return torch.empty(most, device=next(iter(masters.values())).device)

    def state_dict(self) -> dict[str, Any]:
        """Return what the inner optimizers remember, by the names of weights."""
        states: dict[str, Any] = {}
        for names, inner in zip(self._chunks, self._inner, strict=True):
            states |= {name: dict(inner.state[self.weights.masters[name]]) for name in names}
        return {"state": states, "lr": self.param_groups[0]["lr"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it again."""
        self.param_groups[0]["lr"] = state_dict["lr"]
        for names, inner in zip(self._chunks, self._inner, strict=True):
            for name in names:
                master = self.weights.masters[name]
                inner.state[master] = {key: _placed(value, master) for key, value in state_dict["state"][name].items()}


def _like(value: torch.Tensor, room: torch.Tensor, master: torch.Tensor) -> torch.Tensor:
    """Return a gradient in the number format and memory layout of its weight, by which fused kernels walk.

    It is written to `room` if it has others.
    """
    if value.dtype == master.dtype and value.stride() == master.stride():
        return value
    return room[: master.numel()].as_strided(master.shape, master.stride()).copy_(value)


def _placed(value: Any, master: torch.Tensor) -> Any:
    """Put what an optimizer remembers of a weight where it is, in its layout."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape == master.shape:
        return torch.empty_like(master, dtype=value.dtype).copy_(value)
    return value.to(master.device, copy=True)  # of the map of a file, which would keep that on the disk


def _norm(gradients: Iterable[torch.Tensor]) -> float:
    """Return the Euclidean length of all together, summed in float32."""
    lengths = [_length(one) for one in gradients]
    return float(torch.linalg.vector_norm(torch.stack(lengths))) if lengths else 0.0


def _length(gradient: torch.Tensor) -> torch.Tensor:
    if gradient.dtype == torch.float32 or gradient.device.type != "cpu":
        return torch.linalg.vector_norm(gradient, dtype=torch.float32)
    # In another format torch's function is eight times slower on a CPU than this. Any order of dimensions will do.
    flat = gradient.permute(sorted(range(gradient.dim()), key=lambda side: -gradient.stride()[side])).reshape(-1)
    piece = torch.empty(min(PIECE, len(flat)))
    return torch.stack([torch.linalg.vector_norm(piece[: len(one)].copy_(one)) for one in flat.split(PIECE)]).norm()


def _chunks(masters: Mapping[str, torch.Tensor]) -> list[list[str]]:
    chunks: list[list[str]] = [[]]
    size = 0
    for name, one in masters.items():
        if size and size + one.numel() > CHUNK:
            chunks.append([])
            size = 0
        chunks[-1].append(name)
        size += one.numel()
    return chunks


def maker(name: str, weight_decay: float) -> Make:
    """Return what makes an inner optimizer. Raises DbcapError where its package is missing."""
    if name == "adamw":
        return lambda some: torch.optim.AdamW(some, weight_decay=weight_decay, fused=True)
    if name == "adafactor":
        return lambda some: torch.optim.Adafactor(some, weight_decay=weight_decay)
    try:
        from bitsandbytes import optim
    except ImportError:
        raise DbcapError("--optimizer adamw8bit needs bitsandbytes", "run `pip install 'dbcap[bnb]'`") from None
    kind: Any = optim.adamw.AdamW8bit
    return lambda some: kind(some, weight_decay=weight_decay)
