"""Operators of a denoiser with backward passes of their own, for bfloat16 on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import product
from typing import Any

import torch
from torch.nn import functional

BLOCK = 4 * 2**20
"""Bytes of scores that are made at once."""
KEYS = 512
"""Keys of a block of scores at most."""
SHORT = 256
"""Keys up to which scores are made for all of them at once."""
FEW = 512
"""Places up to which a convolution is one product, of all neighbours beside each other."""
LARGE = 2**17
"""Weights of a neighbour above which oneDNN's gradient of a convolution's weights is slow."""
ROWS = 1024
"""Rows of a feed-forward layer that are worked on at once."""
ELEMENTS = 2**18
"""What work element by element takes at once: in float32 it stays in the cache."""

Tensors = tuple[torch.Tensor, ...]


class Kept:
    """Results of a checkpointed forward pass that its second run takes instead of computing them again."""

    def __init__(self) -> None:
        self._results: list[Tensors] = []
        self._next: Iterator[Tensors] | None = None

    @contextmanager
    def first(self) -> Iterator[None]:
        """Keep results."""
        token = _kept.set(self)
        try:
            yield
        finally:
            _kept.reset(token)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Give them, in the order in which they came."""
        self._next = iter(self._results)
        with self.first():
            yield

    def result(self, compute: Callable[[], Tensors]) -> Tensors:
        """Return what `compute` returns, or returned the first time."""
        if self._next is None:
            self._results.append(compute())
        results = self._results[-1] if self._next is None else next(self._next)
        return tuple(one.detach() for one in results)


_kept: ContextVar[Kept | None] = ContextVar("kept", default=None)


def dear(compute: Callable[[], Tensors]) -> Tensors:
    """Return results that take much time and little memory: within a checkpoint they are computed once."""
    kept = _kept.get()
    return compute() if kept is None else kept.result(compute)


class Attention(torch.autograd.Function):
    """softmax(Q K^T / sqrt(D)) V for query (B, H, S, D), key and value (B, H, T, D) -> (B, H, S, D)."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend with torch's kernel."""
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        attended, logarithms = dear(lambda: flash(query, key, value))
        ctx.save_for_backward(query, key, value, attended, logarithms)
        return attended

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tensors:
        """Return the gradients of query, key and value."""
        query, key, value, attended, logarithms = ctx.saved_tensors
        if key.shape[2] <= SHORT:
            return _attend_short(grad, query, key, value)
        return _attend_blocks(grad, query, key, value, attended, logarithms)


def _attend_short(grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Tensors:
    """Make the scores of some heads to all keys again."""
    (batch, heads, places, size), keys = query.shape, key.shape[2]
    some = min(heads, max(1, BLOCK // (places * keys * query.element_size())))
    grads = tuple(_alike(one) for one in (query, key, value))
    memory = query.new_empty(2, some, places, keys)
    for row, first in product(range(batch), range(0, heads, some)):
        at = row, slice(first, first + some)
        q, k, v, g = query[at], key[at] * size**-0.5, value[at], grad[at]
        p, d = memory[:, : len(q)]
        torch.softmax(torch.bmm(q, k.mT, out=p), -1, out=p)
        torch.bmm(g, v.mT, out=d)
        torch.ops.aten._softmax_backward_data(d, p, -1, d.dtype, grad_input=d)
        grads[0][at] = torch.bmm(d, k)
        grads[1][at] = torch.bmm(d.mT, q).mul_(size**-0.5)
        grads[2][at] = torch.bmm(p.mT, g)
    return grads


def _attend_blocks(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attended: torch.Tensor,
    logsum: torch.Tensor,
) -> Tensors:
    """Make the scores of some heads to some keys again.

    P = exp(S - logsum), dS = P * (dO V^T - sum(dO * O)), dV = P^T dO, dK = dS^T Q, dQ = dS K. What is subtracted from
    a row of S and of dO V^T is two more columns of their factors, so that the difference alone is rounded.
    """
    (batch, heads, places, size), keys = query.shape, key.shape[2]
    some = min(keys, KEYS, max(32, BLOCK // (places * query.element_size())))
    many = min(heads, max(1, BLOCK // (places * some * query.element_size())))
    grads = tuple(_alike(one) for one in (query, key, value))
    scaled, ones = key * size**-0.5, key.new_ones(())
    offset, weight = _offset(query, scaled, logsum)
    delta = weight * torch.linalg.vecdot(grad.float(), attended.float())
    weighed = grad * weight[..., None].to(grad.dtype)
    factors = (
        _columns(query, -offset),
        _columns(scaled, ones.expand(key.shape[:3])),
        _columns(value, ones.expand(key.shape[:3])),
        _columns(weighed, -delta),
    )
    upright = query.mT.contiguous(), weighed.mT.contiguous()
    memory, total = query.new_empty(2, many * places * some), torch.empty(many, places, size)
    for row, first in product(range(batch), range(0, heads, many)):
        at = row, slice(first, first + many)
        q, k, v, g = (one[at] for one in factors)
        total[: len(q)].zero_()
        turned = query.new_empty(2, len(q), size, keys)
        for place in range(0, keys, some):
            to = slice(place, place + some)
            p, d = memory[:, : len(q) * places * len(range(keys)[to])].view(2, len(q), places, -1)
            torch.exp_(torch.bmm(q, k[:, to].mT, out=p))
            torch.bmm(g, v[:, to].mT, out=d).mul_(p)
            total[: len(q)] += torch.bmm(d, k[:, to, :size])
            torch.bmm(upright[0][at], d, out=turned[0, :, :, to])
            torch.bmm(upright[1][at], p, out=turned[1, :, :, to])
        grads[0][at] = total[: len(q)]
        grads[1][at] = turned[0].mT.mul_(size**-0.5)
        grads[2][at] = turned[1].mT
    return grads


def _offset(query: torch.Tensor, key: torch.Tensor, logsum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return c, and exp(c - logsum) as a power of two, for each row of scores (B, H, S).

    Scores near c are rounded least, so it should be their mean as weighed by P. That lies between the plain mean and
    logsum: at 2 logsum - mean - 2 log(T) where scores are normally distributed, at logsum where one of them rules.
    """
    mean = torch.matmul(query, key.mean(2, keepdim=True).mT)[..., 0].float()
    wanted = (2 * (logsum - math.log(key.shape[2])) - mean).maximum(mean).minimum(logsum)
    halvings = ((logsum - wanted) / math.log(2)).round()
    return logsum - halvings * math.log(2), torch.exp2(-halvings)


def _columns(x: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """Return x (..., D) with two columns more that together are `more` (...): its upper and its lower half."""
    wide = x.new_empty(*x.shape[:-1], x.shape[-1] + 2)
    wide[..., :-2], wide[..., -2] = x, more
    wide[..., -1] = more - wide[..., -2]
    return wide


def _alike(x: torch.Tensor) -> torch.Tensor:
    """Return memory for a gradient of x (B, H, S, D), heads beside each other as linear layers want them."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


class Convolution(torch.autograd.Function):
    """x (B, C, H, W), channels last, weight (D, C, K, L), bias (D) -> (B, D, H', W')."""

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
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        (x, weight), (stride, padding), needed = ctx.saved_tensors, ctx.window, ctx.needs_input_grad
        grad = grad.contiguous(memory_format=torch.channels_last)
        ours = _large(weight)
        back = ours and _few(x, (1, 1)) and stride == (1, 1)
        mask = [needed[0] and not back, needed[1] and not ours, False]
        grads: list[torch.Tensor | None] = [None] * 3
        if any(mask):
            one = [1, 1]
            arguments = grad, x, weight, None, stride, padding, one, False, [0, 0], 1, mask
            grads = list(torch.ops.aten.convolution_backward(*arguments))
        if needed[2]:
            grads[2] = grad.sum((0, 2, 3))
        if needed[0] and back:
            grads[0] = _convolution_input(grad, weight, padding)
        if needed[1] and ours:
            grads[1] = _convolution_weight(grad, x, weight, stride, padding)
        return *grads, None, None


def _large(weight: torch.Tensor) -> bool:
    return weight.shape[0] * weight.shape[1] > LARGE


def _few(x: torch.Tensor, stride: tuple[int, int]) -> bool:
    return x[:, 0, :: stride[0], :: stride[1]].numel() <= FEW


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> torch.Tensor:
    if not (_large(weight) and _few(x, stride)):
        return functional.conv2d(x, weight, bias, stride, padding)
    near = torch.stack(_shifted(x, weight.shape[2:], stride, padding), 3).flatten(3)
    return functional.linear(near, weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)


def _convolution_input(grad: torch.Tensor, weight: torch.Tensor, padding: tuple[int, int]) -> torch.Tensor:
    """Return the gradient of x for stride 1: a convolution of grad with the turned window."""
    kernel = weight.shape[2:]
    around = kernel[0] - 1 - padding[0], kernel[1] - 1 - padding[1]
    near = torch.stack(_shifted(grad, kernel, (1, 1), around)[::-1], 3).flatten(3)
    return (near @ weight.permute(2, 3, 0, 1).flatten(0, 2)).permute(0, 3, 1, 2)


def _convolution_weight(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> torch.Tensor:
    """Return the gradient of the weights: for each neighbour a product over all places."""
    turned = grad.permute(0, 2, 3, 1).flatten(0, 2).t().contiguous()
    shifted = _shifted(x, weight.shape[2:], stride, padding)
    found = weight.new_empty(len(turned), len(shifted), x.shape[1])
    if _few(x, stride):
        near = torch.stack(shifted, 3).flatten(3).flatten(0, 2)
        torch.mm(turned, near, out=found.view(len(turned), -1))
    else:
        rows = x.new_empty(shifted[0].shape)
        for number, places in enumerate(shifted):
            torch.mm(turned, rows.copy_(places).flatten(0, 2), out=found[:, number])
    return found.unflatten(1, weight.shape[2:]).permute(0, 3, 1, 2)


def _shifted(
    x: torch.Tensor, kernel: tuple[int, ...], stride: tuple[int, int], padding: tuple[int, int]
) -> list[torch.Tensor]:
    """Return for each place of a window what lies there, (B, H', W', C) each."""
    padded = functional.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    height, width = (
        (size - window) // step + 1 for size, window, step in zip(padded.shape[1:3], kernel, stride, strict=True)
    )
    return [
        padded[:, row :: stride[0], column :: stride[1]][:, :height, :width]
        for row, column in product(range(kernel[0]), range(kernel[1]))
    ]


class Normalise(torch.autograd.Function):
    """Group normalisation (arXiv:1803.08494) of x (B, C, H, W), channels last, then x -> x sigmoid(x) if `activate`."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, epsilon: float, activate: bool
    ) -> torch.Tensor:
        """Normalise. With weights in float32 torch keeps mean and spread in float32."""
        x = x.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = x.shape
        normal, mean, spread = torch.native_group_norm(
            x, weight.float(), bias.float(), batch, channels, height * width, groups, epsilon
        )
        ctx.save_for_backward(x, weight, bias, mean, spread)
        ctx.activate = activate
        return functional.silu(normal, inplace=True) if activate else normal

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        x, weight, bias, mean, spread = ctx.saved_tensors
        groups = mean.shape[1]
        size = x.shape[1] // groups
        mean, spread = mean.repeat_interleave(size, 1), spread.repeat_interleave(size, 1)
        factor = weight.float() * spread
        shift = bias.float() - mean * factor
        rows, grads = (one.permute(0, 2, 3, 1).flatten(1, 2) for one in (x, grad))
        back = rows.new_empty(rows.shape)
        sums, moments = torch.zeros(2, *mean.shape)
        inner = torch.empty(rows.shape[1:])
        places = max(1, ELEMENTS // x.shape[1])
        for row in range(len(x)):
            for at in (slice(first, first + places) for first in range(0, len(inner), places)):
                values, inside = rows[row, at].float(), inner[at].copy_(grads[row, at])
                if ctx.activate:
                    normal = torch.addcmul(shift[row], values, factor[row])
                    torch.ops.aten.silu_backward(inside, normal, grad_input=inside)
                sums[row] += inside.sum(0)
                moments[row] += values.mul_(inside).sum(0)
            moments[row] = (moments[row] - mean[row] * sums[row]) * spread[row]
            both = torch.stack((sums[row], moments[row])) * weight.float()
            first, second = both.view(2, groups, size).sum(2).repeat_interleave(size, 1) / (size * len(inner))
            slope = -spread[row] * spread[row] * second
            offset = -spread[row] * first - mean[row] * slope
            for at in (slice(first, first + places) for first in range(0, len(inner), places)):
                values = torch.addcmul(offset, rows[row, at].float(), slope)
                back[row, at] = values.addcmul_(inner[at], factor[row])
        shape = x.shape[0], x.shape[2], x.shape[3], x.shape[1]
        return (
            back.view(shape).permute(0, 3, 1, 2),
            moments.sum(0).to(weight.dtype),
            sums.sum(0).to(bias.dtype),
            None,
            None,
            None,
        )


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
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, of both weights and of both biases."""
        x, first, offset, last = ctx.saved_tensors
        needed, sums = ctx.needs_input_grad, _Sums()
        back = torch.empty_like(x, memory_format=torch.contiguous_format)
        for rows, above, to in _pieces(x, grad, back):
            value, gate = _halves(rows, first, offset)
            inner, active = above @ last, functional.gelu(gate)
            both = rows.new_empty(len(rows), len(first))
            values, gates = both.chunk(2, 1)
            torch.mul(inner, active, out=values)
            if needed[3]:
                sums.add(3, above.t().contiguous() @ active.mul_(value))
            torch.ops.aten.gelu_backward(value.mul_(inner), gate, grad_input=gates)
            if needed[0]:
                torch.mm(both, first, out=to)
            if needed[1]:
                sums.add(1, both.t() @ rows)
            if needed[2]:
                sums.add(2, both.sum(0))
        bias = grad.flatten(0, -2).sum(0) if needed[4] else None
        return back if needed[0] else None, sums.get(1), sums.get(2), sums.get(3), bias


class _Sums:
    """Sums of tensors by their number: in float32 as soon as there are two."""

    def __init__(self) -> None:
        self._sums: dict[int, torch.Tensor] = {}

    def add(self, number: int, more: torch.Tensor) -> None:
        self._sums[number] = self._sums[number].float().add_(more) if number in self._sums else more

    def get(self, number: int) -> torch.Tensor | None:
        return self._sums[number].bfloat16() if number in self._sums else None


def _halves(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Tensors:
    """Return x W^T + b in two pieces of memory."""
    return tuple(map(functional.linear, (x, x), weight.chunk(2), bias.chunk(2)))


def _pieces(*tensors: torch.Tensor) -> Iterator[Tensors]:
    """Give the rows (..., C) of all of them, ROWS at a time."""
    return zip(*(one.flatten(0, -2).split(ROWS) for one in tensors), strict=True)
