"""A moving average of the weights, which with `--ema` becomes the result."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Average:
    """An exponential moving average in float32, begun with the parameters as they are.

    It is a function of the parameters after each step and nothing else: nothing is drawn, and sums have one order.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        """`parameters`, by name, are those that training changes in place; `decay` is the largest, below 1."""
        self._parameters, self._decay = dict(parameters), decay
        # Each lies in memory as its parameter does, channels last for example.
        self._averages = {name: one.detach().to(torch.float32, copy=True) for name, one in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after step number `step`, counted from 1: average += (1 - d) (parameter - average).

        d = min(decay, (1 + step) / (10 + step)), so that the first steps are soon forgotten (the `num_updates` of
        TensorFlow's ExponentialMovingAverage).
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, average in self._averages.items():
            average.lerp_(self._parameters[name].detach().float(), 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """Return the averages by name: the very tensors, which the next update changes."""
        return dict(self._averages)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises ValueError for one of other parameters."""
        if {name: one.shape for name, one in state.items()} != {n: one.shape for n, one in self._averages.items()}:
            raise ValueError("the averages are of other parameters")
        for name, average in self._averages.items():
            average.copy_(state[name])
