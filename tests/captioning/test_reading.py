"""Reading ahead: in order, never too far, cancelled when nobody wants it; and inputs that fail come back as such."""

from __future__ import annotations

import io
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dbcap.captioning import reading
from dbcap.captioning.reading import Prepared
from dbcap.config.models import CaptionConfig
from dbcap.errors import InputError
from dbcap.inputs import Source

CONFIG = CaptionConfig(inputs=("x",))


def sources(count: int) -> list[Source]:
    return [Source(f"{number}.png") for number in range(count)]


def threads() -> int:
    return sum(thread.name.startswith("dbcap-read") for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    end = time.monotonic() + 5
    while threads():
        assert time.monotonic() < end, "a reading thread is left"
        time.sleep(0.01)


# ---- in_order


@pytest.mark.parametrize("workers", [0, 1, 4, 9])
@pytest.mark.parametrize("ahead", [1, 3, 50])
def test_results_come_in_order(workers, ahead):
    pause = random.Random(0)

    def work(source: Source) -> Prepared:
        time.sleep(pause.random() / 500)
        return Prepared(source)

    inputs = sources(30)
    assert [item.source for item in reading.in_order(inputs, work, workers, ahead)] == inputs


@pytest.mark.parametrize(("workers", "ahead"), [(1, 1), (2, 5), (8, 3), (4, 12)])
def test_no_more_than_so_many_are_made_before_they_are_asked_for(workers, ahead):
    lock = threading.Lock()
    begun, taken, most = 0, 0, 0

    def work(source: Source) -> Prepared:
        nonlocal begun, most
        with lock:
            begun += 1
            most = max(most, begun - taken)
        return Prepared(source)

    for _ in reading.in_order(sources(60), work, workers, ahead):
        time.sleep(0.001)  # the model is slow: the readers are always as far ahead as they may
        with lock:
            taken += 1
    assert begun == 60
    assert most <= ahead, "images pile up in memory"
    assert most == ahead or workers > ahead, "the readers could have been further"


def test_without_workers_nothing_is_read_before_it_is_asked_for():
    begun: list[Source] = []

    def work(source: Source) -> Prepared:
        begun.append(source)
        return Prepared(source)

    items = reading.in_order(sources(5), work, 0, 10)
    assert not begun
    next(items)
    next(items)
    assert len(begun) == 2


@pytest.mark.parametrize("workers", [1, 5])
def test_closing_cancels_what_has_not_begun(workers, monkeypatch):
    monkeypatch.setattr(reading, "JOIN_SECONDS", 0.3)
    begun: list[str] = []
    go = threading.Event()

    def work(source: Source) -> Prepared:
        begun.append(source.name)
        if source.name != "0.png":
            go.wait(5)
        return Prepared(source)

    items = reading.in_order(sources(100), work, workers, 50)
    next(items)
    while len(begun) < workers + 1:
        time.sleep(0.001)
    start = time.monotonic()
    items.close()
    assert 0.2 < time.monotonic() - start < 1, "it waits a little for threads that are reading, however many they are"
    go.set()
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(begun, key=lambda name: int(name[:-4])) == [f"{number}.png" for number in range(workers + 1)]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_an_exception_comes_out_where_its_result_would(workers, error):
    def work(source: Source) -> Prepared:
        if source.name == "7.png":
            raise error
        return Prepared(source)

    items = reading.in_order(sources(20), work, workers, 10)
    for number in range(7):
        assert next(items).source.name == f"{number}.png"
    with pytest.raises(type(error)) as caught:
        next(items)
    assert caught.value is error


def test_waiting_threads_hold_no_pixels():
    import gc
    import weakref

    class Pixels(np.ndarray):
        pass

    held: list[weakref.ref[Any]] = []

    def work(source: Source) -> Prepared:
        pixels = np.zeros(4, np.float32).view(Pixels)
        held.append(weakref.ref(pixels))
        return Prepared(source, pixels)

    items = reading.in_order(sources(4), work, 2, 10)
    for _ in range(3):
        next(items)
    time.sleep(0.05)
    gc.collect()
    assert sum(reference() is not None for reference in held) == 1, "the one that nobody has taken yet"
    items.close()


# ---- groups


def prepared(pattern: str) -> Iterator[Prepared]:
    """`+` is a good input, `-` a bad one."""
    for number, sign in enumerate(pattern):
        yield Prepared(Source(str(number)), error=InputError("bad", kind="bad") if sign == "-" else None)


@pytest.mark.parametrize(
    ("pattern", "size", "expected"),
    [
        ("", 3, []),
        ("+++++++", 3, ["+++", "+++", "+"]),
        ("+-+-+-+", 3, ["+-+-+", "-+"]),
        ("---+++", 3, ["---+++"]),
        ("+++---", 3, ["+++", "---"]),
        ("----", 3, ["----"]),
        ("-" * 600, 2, ["-" * 258, "-" * 258, "-" * 84]),
        ("+" + "-" * 300 + "+", 2, ["+" + "-" * 257, "-" * 43 + "+"]),
        ("++", 1, ["+", "+"]),
    ],
)
def test_groups_hold_as_many_good_inputs_as_a_batch(pattern, size, expected):
    found = list(reading.groups(prepared(pattern), size))
    assert ["".join("-" if item.error else "+" for item in group) for group in found] == expected
    assert [item.source.name for group in found for item in group] == [str(number) for number in range(len(pattern))]


# ---- prepare


def pixels_of(image: Image.Image) -> Any:
    return np.asarray(image, np.float32).transpose(2, 0, 1)


def test_a_picture_becomes_pixels(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (5, 4), (10, 20, 30)).save(path)
    item = reading.prepare(Source(str(path)), CONFIG, pixels_of)
    assert item.error is None
    assert item.pixels is not None
    assert item.pixels[:, 0, 0].tolist() == [10, 20, 30]
    assert (item.width, item.height) == (5, 4)
    import hashlib

    assert item.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_settings_of_reading_are_heeded(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGBA", (5, 4), (0, 0, 0, 0)).save(path)
    config = CaptionConfig(inputs=("x",), alpha="#010203", max_pixels=20)
    item = reading.prepare(Source(str(path)), config, pixels_of)
    assert item.pixels is not None
    assert item.pixels[:, 0, 0].tolist() == [1, 2, 3]
    config = CaptionConfig(inputs=("x",), max_pixels=19)
    item = reading.prepare(Source(str(path)), config, pixels_of)
    assert item.error is not None
    assert item.error.kind == "too-large"


def test_what_cannot_be_read_comes_back_with_its_error(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("no picture")
    item = reading.prepare(Source(str(path)), CONFIG, pixels_of)
    assert item.error is not None
    assert item.error.kind == "not-an-image"
    assert item.pixels is None
    known = InputError("no such file", kind="missing")
    assert reading.prepare(Source("x", error=known), CONFIG, pixels_of).error is known


@pytest.mark.parametrize("error", [ValueError("too thin"), TypeError("x"), ZeroDivisionError("x"), MemoryError("x")])
def test_what_the_processor_refuses_is_a_failed_input(tmp_path, error):
    path = tmp_path / "a.png"
    Image.new("RGB", (5, 4)).save(path)

    def refuse(image: Image.Image) -> Any:
        raise error

    item = reading.prepare(Source(str(path)), CONFIG, refuse)
    assert item.error is not None
    assert item.error.kind == "unsupported"
    assert "the model's processor refuses it" in item.error.message


def test_a_fault_in_the_processor_is_no_failed_input(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (5, 4)).save(path)

    def broken(image: Image.Image) -> Any:
        raise AttributeError("fault")

    with pytest.raises(AttributeError):
        reading.prepare(Source(str(path)), CONFIG, broken)


def test_urls_are_fetched(tmp_path):
    import http.server

    body = io.BytesIO()
    Image.new("RGB", (5, 4), (9, 9, 9)).save(body, "PNG")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(body.getvalue())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        good = reading.prepare(Source(f"{url}/a.png", is_url=True), CONFIG, pixels_of)
        gone = reading.prepare(Source(f"{url}/b.png", is_url=True), CONFIG, pixels_of)
        small = CaptionConfig(inputs=("x",), url_max_mb=1)
        assert reading.prepare(Source(f"{url}/a.png", is_url=True), small, pixels_of).error is None
        server.shutdown()
    assert (good.width, good.height, good.error) == (5, 4, None)
    assert gone.error is not None
    assert gone.error.kind == "url-status"


@pytest.mark.parametrize(
    ("name", "is_url", "stem"),
    [
        ("a/b/c.tar.png", False, "c.tar"),
        ("c", False, "c"),
        ("http://host/x/y.jpg?size=3.png#z", True, "y"),
        ("http://host", True, ""),
        (str(Path("a") / "http:"), False, "http:"),
    ],
)
def test_stems(name, is_url, stem):
    assert reading.stem_of(Source(name, is_url=is_url)) == stem


@pytest.mark.parametrize(
    ("count", "most", "size"), [(0, 8, 0), (1, 8, 1), (8, 8, 8), (9, 8, 5), (70, 64, 35), (2000, 16, 16), (17, 16, 9)]
)
def test_batches_fill_up_evenly(count, most, size):
    assert reading.evenly(count, most) == size
