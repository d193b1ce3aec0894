"""Attention of a denoiser with a backward pass of its own, for bfloat16 on a CPU."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dbcap.models import cpu
from dbcap.training.gradients import Tensors, dear

BLOCK = 4 * 2**20
"""Bytes of scores that are made at once."""
KEYS = 512
"""Keys of a block of scores at most."""
SHORT = 256
"""Keys up to which all scores of an image are made at once."""
LN2 = math.log(2)


class Attention(torch.autograd.Function):
    """softmax(Q K^T / sqrt(D)) V for query (B, H, S, D), key and value (B, H, T, D) -> (B, H, S, D)."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend: with torch's kernel where it uses AMX, to a prompt, and where tensors have shapes only."""
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        torchs = key.shape[2] <= SHORT or query.is_meta or cpu.cpu_class() == "amx"
        attended, logsum = dear(lambda: (flash if torchs else _attend)(query, key, value))
        ctx.save_for_backward(query, key, value, attended, logsum)
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Tensors:
        """Return the gradients of query, key and value."""
        query, key, value, attended, logsum = ctx.saved_tensors
        if key.shape[2] <= SHORT:
            return _attend_short(grad, query, key, value)
        return _attend_blocks(grad, query, key, value, attended, logsum)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Tensors:
    """Return what attention gives, and the logarithm of each row's sum of exponentials (B, H, S), in float32.

    From a row's scores not the largest is taken off but what `_centres` expects to weigh most. Where a score is more
    than 88 above that, its exponential is infinite; torch's kernel does it then.
    """
    (batch, heads, places, size), keys = query.shape, key.shape[2]
    scale, centres = size**-0.5 / LN2, _centres(query, key)
    queries, keyed = _columns(query, -centres).flatten(0, 1), _columns(key).flatten(0, 1)
    values = value.flatten(0, 1)
    attended, sums = query.new_empty(batch, places, heads, size), torch.empty(batch * heads, places, 1)
    rows = max(1, BLOCK // (keys * query.element_size()))
    memory = query.new_empty(1, min(rows, places), keys)
    for head, first in product(range(batch * heads), range(0, places, rows)):
        at = slice(first, first + rows)
        scores = _multiply(queries[None, head, at], keyed[None, head], scale, memory[:, : len(range(places)[at])])[0]
        total = torch.sum(torch.exp2_(scores), 1, keepdim=True, dtype=torch.float32, out=sums[head, at])
        attended[head // heads, at, head % heads] = torch.mm(scores, values[head]) / total
    logsum = (centres * scale + sums.log2().view(centres.shape)) * LN2
    if not logsum.isfinite().all():
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    return attended.transpose(1, 2), logsum


def _attend_short(grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Tensors:
    """Make the scores of some images to all keys again."""
    (batch, heads, places, size), keys = query.shape, key.shape[2]
    images = min(batch, max(1, BLOCK // (heads * places * keys * query.element_size())))
    grads = tuple(_alike(one) for one in (query, key, value))
    memory = query.new_empty(2, images * heads, places, keys)
    for first in range(0, batch, images):
        at = slice(first, first + images)
        # of one image these are views
        q, k, v, g = (one[at].flatten(0, 1) for one in (query, key, value, grad))
        p, d = memory[:, : len(q)]
        torch.softmax(_multiply(q, k, size**-0.5, p), -1, out=p)
        torch.bmm(g, v.mT, out=d)
        torch.ops.aten._softmax_backward_data(d, p, -1, d.dtype, grad_input=d)
        grads[0][at] = ((d @ k) * size**-0.5).unflatten(0, (-1, heads))
        grads[1][at] = ((d.mT @ q) * size**-0.5).unflatten(0, (-1, heads))
        grads[2][at] = (p.mT @ g).unflatten(0, (-1, heads))
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

    P = exp(S - logsum), dS = P * (dO V^T - sum(dO * O)), dV = P^T dO, dK = dS^T Q, dQ = dS K. What is taken off a row
    of S and of dO V^T is two more columns of their factors, so that only the difference is rounded. Exponentials are
    powers of two, which are faster: S and logsum are divided by log(2).
    """
    (batch, heads, places, size), keys = query.shape, key.shape[2]
    some = min(keys, KEYS, max(32, BLOCK // (places * query.element_size())))
    many = min(heads, max(1, BLOCK // (places * some * query.element_size())))
    grads = tuple(_alike(one) for one in (query, key, value))
    scale = size**-0.5 / LN2
    halvings = _halvings(query, key, logsum / LN2, scale)
    weighed = grad * torch.exp2(-halvings)[..., None].to(grad.dtype)
    delta = torch.exp2(-halvings) * torch.linalg.vecdot(grad.float(), attended.float())
    offset = (halvings - logsum / LN2) / scale
    factors = [_columns(query, offset), _columns(key), _columns(value), _columns(weighed, -delta)]
    upright = query.mT.contiguous(), weighed.mT.contiguous()
    memory, total = query.new_empty(2, many * places * some), torch.empty(many, places, size)
    for row, first in product(range(batch), range(0, heads, many)):
        at = row, slice(first, first + many)
        q, k, v, g = (one[at] for one in factors)
        turned = query.new_empty(2, len(q), size, keys)
        total[: len(q)].zero_()
        for place in range(0, keys, some):
            to = slice(place, place + some)
            p, d = memory[:, : len(q) * places * k[0, to].shape[0]].unflatten(1, (len(q), places, -1))
            torch.exp2_(_multiply(q, k[:, to], scale, p))
            torch.bmm(g, v[:, to].mT, out=d).mul_(p)
            total[: len(q)].add_(d @ k[:, to, :size])
            torch.bmm(upright[0][at], d, out=turned[0, :, :, to])
            torch.bmm(upright[1][at], p, out=turned[1, :, :, to])
        grads[0][at] = total[: len(q)] * size**-0.5
        grads[1][at] = turned[0].mT.mul_(size**-0.5)
        grads[2][at] = turned[1].mT
    return grads


def _multiply(query: torch.Tensor, key: torch.Tensor, scale: float, out: torch.Tensor) -> torch.Tensor:
    """Write scale Q K^T for (N, S, D) and (N, T, D); a factor scaled before would be rounded once more."""
    return torch.baddbmm(out, query, key.mT, beta=0, alpha=scale, out=out)


def _halvings(query: torch.Tensor, key: torch.Tensor, logsum: torch.Tensor, scale: float) -> torch.Tensor:
    """Return for each row of scores a whole n (B, H, S), with which 2^(S - logsum + n) is made instead.

    Scores near logsum - n are rounded least, so that should be their mean as weighed by P. It lies between the plain
    mean and logsum: at 2 (logsum - log(T)) - mean where scores are normally distributed, at logsum where one rules.
    """
    mean = _means(query, key) * scale
    wanted = (2 * (logsum - math.log2(key.shape[2])) - mean).maximum(mean).minimum(logsum)
    return (logsum - wanted).round()


def _centres(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return for each row of Q K^T a number near its values as weighed by softmax(Q K^T / sqrt(D)), (B, H, S).

    Of T normally distributed scores with standard deviation s these lie s^2 above the mean, but no further than the
    largest of them, near s sqrt(2 log(T)).
    """
    apart = key - key.mean(2, keepdim=True)
    covariance = apart.mT @ apart / (key.shape[2] * query.shape[-1] ** 0.5)
    squares = torch.linalg.vecdot(query @ covariance, query).float().relu()
    furthest = (squares * (2 * math.log(key.shape[2]) * query.shape[-1] ** 0.5)).sqrt()
    return _means(query, key) + squares.minimum(furthest)


def _means(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return the mean of each row of Q K^T, (B, H, S)."""
    return torch.matmul(query, key.mean(2, keepdim=True).mT)[..., 0].float()


def _columns(x: torch.Tensor, more: torch.Tensor | None = None) -> torch.Tensor:
    """Return x (..., D) and two columns: the upper and the lower half of `more` (...), or what takes both: ones."""
    wide = x.new_ones(*x.shape[:-1], x.shape[-1] + 2)
    wide[..., :-2] = x
    if more is not None:
        wide[..., -2] = more
        wide[..., -1] = more - wide[..., -2]
    return wide


def _alike(x: torch.Tensor) -> torch.Tensor:
    """Return memory for a gradient of x (B, H, S, D), heads beside each other as linear layers want them."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)
