"""Reading ahead: images are read and prepared in threads while the model works, and come out in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from dbcap import images, web
from dbcap.config.models import CaptionConfig
from dbcap.errors import InputError
from dbcap.inputs import Source


@dataclass(frozen=True, slots=True)
class Prepared:
    """One input, ready for the model or failed."""

    source: Source
    pixels: npt.NDArray[np.float32] | None = None  # (3, H, W)
    sha256: str = ""
    width: int = 0
    height: int = 0
    error: InputError | None = None


def prepare(
    source: Source, config: CaptionConfig, to_pixels: Callable[[Image.Image], npt.NDArray[np.float32]]
) -> Prepared:
    """Read one input and turn it into pixels; an input that cannot be read comes back with its error."""
    if source.error:
        return Prepared(source, error=source.error)
    try:
        if source.is_url:
            data = web.fetch(source.name, timeout=config.url_timeout, max_bytes=config.url_max_mb * 1_000_000)
            picture = images.read_bytes(data, alpha=config.alpha, max_pixels=config.max_pixels)
        else:
            picture = images.read(source.name, alpha=config.alpha, max_pixels=config.max_pixels)
        try:
            pixels = to_pixels(picture.image)
        except (ValueError, TypeError, ZeroDivisionError) as error:  # a processor that cannot take such a shape
            raise InputError(f"the model's processor refuses it: {error}", kind="unsupported") from error
    except InputError as error:
        return Prepared(source, error=error)
    return Prepared(source, pixels, picture.sha256, picture.width, picture.height)


def in_order(
    sources: Sequence[Source], work: Callable[[Source], Prepared], workers: int, ahead: int
) -> Iterator[Prepared]:
    """Apply `work` to all sources, at most `ahead` of them before they are asked for; 0 workers do it in turn."""
    if workers == 0:
        yield from map(work, sources)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="dbcap-read")
    waiting: deque[Future[Prepared]] = deque()
    try:
        for source in sources:
            waiting.append(pool.submit(work, source))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def groups(items: Iterator[Prepared], size: int) -> Iterator[list[Prepared]]:
    """Cut the stream so that each group holds `size` good inputs, and the bad ones that stand among them."""
    group: list[Prepared] = []
    good = 0
    for item in items:
        group.append(item)
        good += item.error is None
        if good == size or len(group) >= size + 256:
            yield group
            group, good = [], 0
    if group:
        yield group


def stem_of(source: Source) -> str:
    """Return the file name of an input without its ending."""
    from urllib.parse import urlsplit

    path = urlsplit(source.name).path if source.is_url else source.name
    return os.path.splitext(os.path.basename(path))[0]
