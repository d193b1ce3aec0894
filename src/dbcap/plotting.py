"""A run as a picture: curves over its steps, and below them pictures that it made on its way. Drawn by Pillow alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from dbcap.files import open_atomic
from dbcap.pixels import HOSTILE

WIDTH = 1200
_MARGIN = 40
_LEFT = 96
"""Where axes begin, and pictures: to the left stand what belongs to a line of them."""
_FINE = 3
"""Lines are drawn this many times larger and reduced: Pillow's own have steps."""
_MOST_POINTS = 3000
_MOST_COLUMNS, _MOST_ROWS = 8, 8
_INSET = 10
"""Pixels to the right of the last step."""
_BETWEEN = 40
"""Pixels between two values that are written at an axis, at least."""
_GAP = 8
_PICTURE = 160
"""Pixels of a picture's side, at most."""
_WHITE, _INK, _GREY, _GRID = (255, 255, 255), (31, 41, 55), (107, 114, 128), (229, 231, 235)
BLUE, ORANGE, GREEN = (37, 99, 235), (234, 115, 23), (5, 150, 105)
Colour = tuple[int, int, int]
_SOFTWARE, _MARK = "Software", "dbcap plot"


@dataclass(frozen=True)
class Curve:
    """Values by step, in order of steps. With `every` each is marked and joined to the next; else they are noisy."""

    label: str
    colour: Colour
    points: Sequence[tuple[int, float]]
    every: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves that share axes."""

    title: str
    curves: Sequence[Curve]
    mark: tuple[int, float] | None = None
    """Step and value of the best checkpoint."""


@dataclass(frozen=True)
class Plot:
    """All that is to be seen."""

    title: str
    subtitle: str
    charts: Sequence[Chart]
    pictures: Mapping[str, Mapping[int, Path]]
    """What a line of pictures is called -> step -> file."""


def draw(plot: Plot) -> Image.Image:
    """Return the picture of a plot, `WIDTH` pixels wide. A file that is no picture leaves its place empty."""
    parts = [_heading(plot), *(_chart(chart, _last_step(plot)) for chart in plot.charts if _values(chart).size)]
    if plot.pictures:
        parts.append(_strip(plot.pictures))
    whole = Image.new("RGB", (WIDTH, sum(part.height for part in parts) + _MARGIN), _WHITE)
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    return whole


def write(plot: Plot, path: Path) -> None:
    """Write a plot as PNG, marked so that `is_plot` knows it again. Raises OSError."""
    info = PngInfo()
    info.add_text(_SOFTWARE, _MARK)
    image = draw(plot)
    with open_atomic(path) as file:
        image.save(file, "PNG", pnginfo=info, optimize=True)


def is_plot(path: Path) -> bool:
    """Return whether `write` wrote a file."""
    if not path.is_file():  # opening a pipe would wait for its other end
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=["PNG"]) as image:
                return image.info.get(_SOFTWARE) == _MARK
    except HOSTILE:
        return False


# ---- words


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _write(image: Image.Image, place: tuple[float, float], text: str, size: int, fill: Colour, anchor: str) -> None:
    ImageDraw.Draw(image).text(place, text, fill, _font(size), anchor)


def _width(text: str, size: int) -> float:
    return _font(size).getlength(text)


def _heading(plot: Plot) -> Image.Image:
    part = Image.new("RGB", (WIDTH, 108), _WHITE)
    _write(part, (_MARGIN, _MARGIN), plot.title, 32, _INK, "lt")
    _write(part, (_MARGIN, 84), plot.subtitle, 17, _GREY, "lt")
    return part


# ---- curves


class _Axes:
    """Where steps and values are on a chart, in pixels of its box."""

    def __init__(self, size: tuple[int, int], last: int, low: float, high: float) -> None:
        self.size, self.last, self.low, self.high = size, max(last, 1), low, high

    def at(self, step: float, value: float) -> tuple[float, float]:
        width, height = self.size
        share = (value - self.low) / (self.high - self.low)
        return step / self.last * (width - _INSET), (1 - share) * height


def smooth(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return values (N,) as their means weighted by a bell curve around each, N / 40 wide; at the ends by its half."""
    spread = max(1.0, len(values) / 40)
    reach = min(math.ceil(3 * spread), len(values))
    bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / spread) ** 2)
    sums, weights = (np.convolve(one, bell)[reach : reach + len(values)] for one in (values, np.ones(len(values))))
    return np.asarray(sums / weights)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers from `low` to `high`, at most about `most`: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]


def _last_step(plot: Plot) -> int:
    return max((step for chart in plot.charts for curve in chart.curves for step, _ in curve.points), default=1)


def _values(chart: Chart) -> npt.NDArray[np.float64]:
    return np.array([value for curve in chart.curves for _, value in curve.points])


def _range(chart: Chart) -> tuple[float, float]:
    """Return the values that a chart shows: of noisy curves the few largest are cut off, from 0 on."""
    values = _values(chart)
    if any(curve.every for curve in chart.curves):
        low, high = float(values.min()), float(values.max())
        room = (high - low) * 0.15 or abs(high) * 0.1 or 1.0
        return low - room, high + room
    means = [smooth(np.array([value for _, value in curve.points])).max() for curve in chart.curves if curve.points]
    return 0.0, float(max(np.quantile(values, 0.98), *means, 0.0)) * 1.08 or 1.0


def _chart(chart: Chart, last: int) -> Image.Image:
    """Draw curves, axes and legend."""
    height = 210 if any(curve.every for curve in chart.curves) else 330
    part = Image.new("RGB", (WIDTH, height + 96), _WHITE)
    axes, (left, top) = _Axes((WIDTH - _LEFT - _MARGIN, height), last, *_range(chart)), (_LEFT, 44)
    part.paste(_lines(chart, axes), (left, top))
    for value in ticks(axes.low, axes.high, height // _BETWEEN):
        _write(part, (left - 10, top + axes.at(0, value)[1]), f"{value:g}", 15, _GREY, "rm")
    for step in ticks(0, axes.last, 8):
        if step == int(step):
            _write(part, (left + axes.at(step, axes.low)[0], top + height + 9), f"{step:g}", 15, _GREY, "mt")
    _write(part, (left + axes.size[0] / 2, top + height + 30), "step", 15, _GREY, "mt")
    _write(part, (left, 16), chart.title, 19, _INK, "lt")
    _legend(part, chart)
    if chart.mark:
        step, value = chart.mark
        x, y = axes.at(step, value)
        right = x < axes.size[0] * 0.7
        words = f"best: {value:.4g} at step {step}"
        place = left + x + (12 if right else -12), top + min(max(y - 16, 12), height - 12)
        _write(part, place, words, 15, GREEN, "lm" if right else "rm")
    return part


def _legend(part: Image.Image, chart: Chart) -> None:
    pen, x = ImageDraw.Draw(part), float(WIDTH - _MARGIN)
    for curve in reversed([curve for curve in chart.curves if curve.points]):
        x -= _width(curve.label, 16)
        _write(part, (x, 26), curve.label, 16, _INK, "lm")
        pen.rectangle((x - 28, 24, x - 8, 28), curve.colour)
        x -= 52


def _lines(chart: Chart, axes: _Axes) -> Image.Image:
    """Draw what is inside of the axes."""
    width, height = axes.size
    fine = Image.new("RGB", (width * _FINE, height * _FINE), _WHITE)
    pen = ImageDraw.Draw(fine)
    for value in ticks(axes.low, axes.high, height // _BETWEEN):
        y = axes.at(0, value)[1] * _FINE
        pen.line((0, y, fine.width, y), _GRID, _FINE)
    for curve in chart.curves:
        if not curve.every:
            for step, value in curve.points[:: -(-len(curve.points) // _MOST_POINTS) or 1]:
                _dot(pen, axes.at(step, value), 2, tuple(255 - (255 - one) * 3 // 10 for one in curve.colour))
    if chart.mark:
        x = axes.at(*chart.mark)[0] * _FINE
        for y in range(0, fine.height, 10 * _FINE):
            pen.line((x, y, x, y + 5 * _FINE), GREEN, _FINE)
    for curve in chart.curves:
        _line(pen, curve, axes)
    if chart.mark:
        _dot(pen, axes.at(*chart.mark), 8, GREEN)
        _dot(pen, axes.at(*chart.mark), 5, _WHITE)
    pen.line((0, 0, 0, fine.height), _GREY, 2 * _FINE)
    pen.line((0, fine.height - 1, fine.width, fine.height - 1), _GREY, 2 * _FINE)
    return fine.reduce(_FINE)


def _line(pen: ImageDraw.ImageDraw, curve: Curve, axes: _Axes) -> None:
    if not curve.points:
        return
    steps = [step for step, _ in curve.points]
    values = np.array([value for _, value in curve.points])
    values = values if curve.every else smooth(values)
    places = [axes.at(step, value) for step, value in zip(steps, values, strict=True)]
    pen.line([(x * _FINE, y * _FINE) for x, y in places], curve.colour, 2 * _FINE + 2, "curve")
    for place in places if curve.every or len(places) == 1 else ():
        _dot(pen, place, 4, curve.colour)


def _dot(pen: ImageDraw.ImageDraw, place: tuple[float, float], radius: float, colour: tuple[int, ...]) -> None:
    x, y, reach = place[0] * _FINE, place[1] * _FINE, radius * _FINE
    pen.ellipse((x - reach, y - reach, x + reach, y + reach), colour)


# ---- pictures


def thinned(numbers: Sequence[int], most: int) -> list[int]:
    """Return at most `most` of them, evenly, the first and the last among them."""
    if len(numbers) <= most:
        return list(numbers)
    return [numbers[round(place * (len(numbers) - 1) / (most - 1))] for place in range(most)]


def _strip(pictures: Mapping[str, Mapping[int, Path]]) -> Image.Image:
    """Draw a table of pictures: a line each, a column a step."""
    steps = thinned(sorted({step for line in pictures.values() for step in line}), _MOST_COLUMNS)
    labels = [list(pictures)[number] for number in thinned(range(len(pictures)), _MOST_ROWS)]
    side = min(_PICTURE, (WIDTH - _LEFT - _MARGIN + _GAP) // max(len(steps), 5) - _GAP)
    part = Image.new("RGB", (WIDTH, 72 + len(labels) * (side + _GAP)), _WHITE)
    _write(part, (_LEFT, 16), "pictures by step", 19, _INK, "lt")
    for column, step in enumerate(steps):
        left = _LEFT + column * (side + _GAP)
        _write(part, (left + side / 2, 52), str(step), 15, _GREY, "mt")
        for row, label in enumerate(labels):
            top = 76 + row * (side + _GAP)
            if not column:
                _write(part, (_LEFT - 10, top + side / 2), label, 15, _GREY, "rm")
            if picture := _opened(pictures[label].get(step), side):
                place = left + (side - picture.width) // 2, top + (side - picture.height) // 2
                part.paste(picture, place)
    return part


def _opened(path: Path | None, side: int) -> Image.Image | None:
    if path is None:
        return None
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return ImageOps.contain(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    except HOSTILE:
        return None
