"""Operators of a denoiser with backward passes of their own, for bfloat16 on a CPU.

Each is a function of tensors, its backward pass written with products and with work element by element. Sums are made
in float32, results are rounded to bfloat16. They give the same bits each time, for the same number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from itertools import product
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

FEW = 512
"""Places up to which a convolution is one product, with all neighbours of a place beside each other."""
LARGE = 2**17
"""Weights between a place and a neighbour above which oneDNN's gradients of a convolution are slow."""
ROWS = 1024
"""Rows of a feed-forward layer that are worked on at once."""
ELEMENTS = 2**18
"""What normalising works on at once: in float32 it stays in the cache."""

Tensors = tuple[torch.Tensor, ...]


class Kept:
    """Results of a checkpointed forward pass: made when this is entered first, given in the same order later."""

    def __init__(self) -> None:
        self._results: list[Tensors] = []
        self._runs = 0

    def __enter__(self) -> None:
        self._runs += 1
        self._next = iter(self._results)
        self._token = _kept.set(self)

    def __exit__(self, *_: object) -> None:
        _kept.reset(self._token)

    def result(self, compute: Callable[[], Tensors]) -> Tensors:
        """Return what `compute` returns, or returned the first time."""
        if self._runs > 1:
            results = next(self._next)
        else:
            self._results.append(results := compute())
        return tuple(one.detach() for one in results)


_kept: ContextVar[Kept | None] = ContextVar("kept", default=None)


def dear(compute: Callable[[], Tensors]) -> Tensors:
    """Return results that take much time and little memory: within a checkpoint they are computed once."""
    kept = _kept.get()
    return compute() if kept is None else kept.result(compute)


class Convolution(torch.autograd.Function):
    """x (B, C, H, W), channels last, weight (D, C, K, L), bias (D) -> (B, D, H', W').

    oneDNN puts weights into blocks and back. Of large ones, and for few places, that takes most of its time; a
    convolution is products of plain matrices then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> torch.Tensor:
        """Convolve."""
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        ctx.window = stride, padding
        return dear(lambda: (_convolve(x, weight, bias, stride, padding),))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        (x, weight), (stride, padding), needed = ctx.saved_tensors, ctx.window, ctx.needs_input_grad
        grad = grad.contiguous(memory_format=torch.channels_last)
        large, plain = _large(weight), stride == (1, 1)
        ours = large and plain and _few(grad), large and (plain or _few(grad))
        mask = [need and not own for need, own in zip(needed, (*ours, True), strict=False)]
        grads: list[torch.Tensor | None] = [None] * 3
        if any(mask):
            window = stride, padding, (1, 1), False, (0, 0), 1
            grads = list(torch.ops.aten.convolution_backward(grad, x, weight, None, *window, mask))
        if needed[0] and ours[0]:
            grads[0] = _convolution_input(grad, weight, padding)
        if needed[1] and ours[1]:
            grads[1] = _convolution_weight(grad, x, weight, stride, padding)
        if needed[2]:
            grads[2] = grad.sum((0, 2, 3))
        return *grads, None, None


def _large(weight: torch.Tensor) -> bool:
    return weight.shape[0] * weight.shape[1] > LARGE


def _few(places: torch.Tensor) -> bool:
    return places[:, 0].numel() <= FEW


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> torch.Tensor:
    if not (_large(weight) and _few(x[:, :, :: stride[0], :: stride[1]])):
        return functional.conv2d(x, weight, bias, stride, padding)
    beside = torch.stack(_neighbours(x, weight, stride, padding), 3).flatten(3)
    return functional.linear(beside, _rows(weight).flatten(1), bias).permute(0, 3, 1, 2)


def _convolution_input(grad: torch.Tensor, weight: torch.Tensor, padding: tuple[int, int]) -> torch.Tensor:
    """Return the gradient of x for stride 1: sums of products with the turned window's weights."""
    around = weight.shape[2] - 1 - padding[0], weight.shape[3] - 1 - padding[1]
    total = torch.zeros(*grad.shape[:1], 1, 1, weight.shape[1])
    for near, to in zip(reversed(_neighbours(grad, weight, (1, 1), around)), weight.flatten(2).unbind(2), strict=True):
        total = total + near @ to
    return total.to(grad.dtype).permute(0, 3, 1, 2)


def _convolution_weight(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> torch.Tensor:
    """Return the gradient of the weights."""
    places = _rows(grad)
    if _few(grad):
        beside = torch.stack(_neighbours(x, weight, stride, padding), 3).flatten(3)
        found = places.flatten(0, 2).t().contiguous() @ beside.flatten(0, 2)
        return found.view(_rows(weight).shape).permute(0, 3, 1, 2)
    # In rows as wide as the padded x, a neighbour is so many places further on.
    padded = _padded(x, padding)
    height, width = (padded.shape[side] - places.shape[side] for side in (1, 2))
    wide = functional.pad(places, (0, 0, 0, width, 0, height)).flatten(0, 2)
    last = len(wide) - height * padded.shape[2] - width
    turned, padded_rows = wide[:last].t().contiguous(), padded.flatten(0, 2)
    found = weight.new_empty(_rows(weight).shape)
    for row, column in product(range(weight.shape[2]), range(weight.shape[3])):
        further = padded_rows[row * padded.shape[2] + column :][:last]
        torch.mm(turned, further, out=found[:, row, column])
    return found.permute(0, 3, 1, 2)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return a view (B, H, W, C) of x (B, C, H, W)."""
    return x.permute(0, 2, 3, 1)


def _padded(x: torch.Tensor, padding: tuple[int, int]) -> torch.Tensor:
    return functional.pad(_rows(x), (0, 0, padding[1], padding[1], padding[0], padding[0]))


def _neighbours(
    x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> list[torch.Tensor]:
    """Return what lies at each place of a window, (B, H', W', C) each."""
    padded = _padded(x, padding)
    height, width = ((padded.shape[1 + side] - weight.shape[2 + side]) // stride[side] + 1 for side in (0, 1))
    return [
        padded[:, row :: stride[0], column :: stride[1]][:, :height, :width]
        for row, column in product(range(weight.shape[2]), range(weight.shape[3]))
    ]


class Normalise(torch.autograd.Function):
    """Group normalisation (arXiv:1803.08494) of x (B, C, H, W), channels last, then x -> x sigmoid(x) if `activate`."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, epsilon: float, activate: bool
    ) -> torch.Tensor:
        """Normalise. With weights in float32 torch gives mean and spread in float32 too."""
        x = x.contiguous(memory_format=torch.channels_last)
        sizes = x.shape[0], x.shape[1], x[0, 0].numel(), groups
        normal, mean, spread = torch.native_group_norm(x, weight.float(), bias.float(), *sizes, epsilon)
        ctx.save_for_backward(x, weight, bias, mean, spread)
        ctx.activate = activate
        return functional.silu(normal, inplace=True) if activate else normal

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        x, weight, bias, means, spreads = ctx.saved_tensors
        images, back = zip(_rows(x).flatten(1, 2), _rows(grad).flatten(1, 2), strict=True), torch.empty_like(x)
        sums = torch.zeros(2, x.shape[1])
        for (rows, above), to, mean, spread in zip(images, _rows(back).flatten(1, 2), means, spreads, strict=True):
            sums += _normalise_back(rows, above, weight, bias, mean, spread, ctx.activate, to)
        return back, sums[0].to(weight.dtype), sums[1].to(bias.dtype), None, None, None


def _normalise_back(
    rows: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    spread: torch.Tensor,
    activate: bool,
    to: torch.Tensor,
) -> torch.Tensor:
    """Write the gradient of an image's rows (P, C) to `to` and return those of weight and bias, (2, C)."""
    groups, size = len(mean), rows.shape[1] // len(mean)
    mean, spread, weight = mean.repeat_interleave(size), spread.repeat_interleave(size), weight.float()
    factor = weight * spread
    shift = bias.float() - mean * factor
    many = max(1, ELEMENTS // rows.shape[1])
    inner, sums = torch.empty(rows.shape), torch.zeros(2, rows.shape[1])
    memory = torch.empty(2, many, rows.shape[1])
    pieces = [one.split(many) for one in (rows, grad, inner, to)]
    for x, above, inside, _ in zip(*pieces, strict=True):
        values, normal = memory[:, : len(x)]
        values.copy_(x)
        inside.copy_(above)
        if activate:
            torch.addcmul(shift, values, factor, out=normal)
            torch.ops.aten.silu_backward(inside, normal, grad_input=inside)
        sums[1].add_(inside.sum(0))
        sums[0].add_(values.mul_(inside).sum(0))
    sums[0] = (sums[0] - mean * sums[1]) * spread
    both = (sums * weight).view(2, groups, size).sum(2).repeat_interleave(size, 1) / (size * len(rows))
    slope = -spread.square() * both[0]
    offset = -spread * both[1] - mean * slope
    for x, _, inside, found in zip(*pieces, strict=True):
        values, normal = memory[:, : len(x)]
        torch.addcmul(offset, values.copy_(x), slope, out=normal)
        found.copy_(normal.addcmul_(inside, factor))
    return sums


class FeedForward(torch.autograd.Function):
    """x (..., K) -> (v * gelu(g)) W^T + b, (..., M), with v and g (..., N) the halves of x U^T + c, U (2 N, K).

    GEGLU, arXiv:2002.05202. What lies between is sixteen times as large as x; it is made for some rows at once, which
    stay in the cache, and again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, first: torch.Tensor, offset: torch.Tensor, last: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        """Multiply, gate and multiply."""
        ctx.save_for_backward(x, first, offset, last)

        def compute() -> Tensors:
            found = x.new_empty(*x.shape[:-1], len(last))
            for rows, to in _pieces(x, found):
                value, gate = _halves(rows, first, offset)
                torch.addmm(bias, value.mul_(functional.gelu(gate)), last.t(), out=to)
            return (found,)

        return dear(compute)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, of both weights and of both biases."""
        x, first, offset, last = ctx.saved_tensors
        needed, back = ctx.needs_input_grad, x.new_empty(x.shape)
        sums = [torch.zeros(one.shape) for one in (first, offset, last)]
        for rows, above, to in _pieces(x, grad, back):
            value, gate = _halves(rows, first, offset)
            inner, active = above @ last, functional.gelu(gate)
            both = rows.new_empty(len(rows), len(first))
            values, gates = both.chunk(2, 1)
            torch.mul(inner, active, out=values)
            if needed[3]:
                sums[2] += above.t().contiguous() @ active.mul_(value)
            torch.ops.aten.gelu_backward(value.mul_(inner), gate, grad_input=gates)
            torch.mm(both, first, out=to)
            if needed[1]:
                sums[0] += both.t() @ rows
            if needed[2]:
                sums[1] += both.sum(0)
        found = *sums, grad.flatten(0, -2).sum(0) if needed[4] else x
        return back, *(one.to(x.dtype) if need else None for one, need in zip(found, needed[1:], strict=True))


def _halves(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Tensors:
    """Return x W^T + b in two pieces of memory."""
    return tuple(map(functional.linear, (x, x), weight.chunk(2), bias.chunk(2)))


def _pieces(*tensors: torch.Tensor) -> Iterator[Tensors]:
    """Give the rows (..., C) of all of them, ROWS at a time."""
    return zip(*(one.flatten(0, -2).split(ROWS) for one in tensors), strict=True)
