"""Reading ahead: images are read and prepared in threads while the model works, and come out in order."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt
from PIL import Image

from dbcap import images, web
from dbcap.config.models import CaptionConfig
from dbcap.errors import InputError
from dbcap.inputs import Source

ToPixels = Callable[[Image.Image], npt.NDArray[np.float32]]
JOIN_SECONDS = 1.0
"""How long the end waits for threads that are still reading; a slow server may keep them for longer."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """One input, ready for the model or failed."""

    source: Source
    pixels: npt.NDArray[np.float32] | None = None  # (3, H, W)
    sha256: str = ""
    width: int = 0
    height: int = 0
    error: InputError | None = None


def prepare(source: Source, config: CaptionConfig, to_pixels: ToPixels) -> Prepared:
    """Read one input and turn it into pixels; an input that cannot be read comes back with its error."""
    if source.error:
        return Prepared(source, error=source.error)
    return prepared(source, lambda: _picture(source, config), to_pixels)


def prepared(source: Source, read: Callable[[], images.Picture], to_pixels: ToPixels) -> Prepared:
    """Do so with a picture that `read` reads."""
    try:
        picture = read()
        try:
            pixels = to_pixels(picture.image)
        except (ValueError, TypeError, ArithmeticError, MemoryError) as error:  # it cannot take such a shape
            raise InputError(f"the model's processor refuses it: {error}", kind="unsupported") from error
    except InputError as error:
        return Prepared(source, error=error)
    return Prepared(source, pixels, picture.sha256, picture.width, picture.height)


def _picture(source: Source, config: CaptionConfig) -> images.Picture:
    if not source.is_url:
        return images.read(source.name, alpha=config.alpha, max_pixels=config.max_pixels)
    data = web.fetch(source.name, timeout=config.url_timeout, max_bytes=config.url_max_mb * 1_000_000)
    return images.read_bytes(data, alpha=config.alpha, max_pixels=config.max_pixels)


def in_order(
    sources: Sequence[Source], work: Callable[[Source], Prepared], workers: int, ahead: int
) -> Generator[Prepared]:
    """Apply `work` to all sources, at most `ahead` of them before they are asked for; 0 workers do it in turn.

    The threads are daemons (a pool's are not): a slow server must not hold up the end of the process.
    """
    if workers == 0:
        yield from map(work, sources)
        return
    jobs: SimpleQueue[tuple[Source, Future[Prepared]] | None] = SimpleQueue()
    waiting: deque[Future[Prepared]] = deque()
    threads = [
        threading.Thread(target=_work_off, args=(jobs, work), name=f"dbcap-read-{number}", daemon=True)
        for number in range(workers)
    ]
    for thread in threads:
        thread.start()
    try:
        for source in sources:
            future: Future[Prepared] = Future()
            waiting.append(future)
            jobs.put((source, future))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        for _ in threads:
            jobs.put(None)
        end = time.monotonic() + JOIN_SECONDS
        for thread in threads:  # one that wakes up while the interpreter shuts down would abort the process
            thread.join(max(0.0, end - time.monotonic()))


def _work_off(jobs: SimpleQueue[tuple[Source, Future[Prepared]] | None], work: Callable[[Source], Prepared]) -> None:
    while job := jobs.get():
        source, future = job
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work(source))
            except BaseException as error:  # noqa: BLE001 - it goes on where the result is asked for
                future.set_exception(error)
        del job, source, future  # a thread that waits must not hold the pixels of the last image


def evenly(count: int, most: int) -> int:
    """Return the size of batches of at most `most` images that fill up best: of 70 and 64 it is 35."""
    return -(-count // max(1, -(-count // most)))


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
