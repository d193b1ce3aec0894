"""The images of a check, and the process that a captioner is tried in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from dbcap.errors import DbcapError, UsageError
from dbcap.exporting import proof
from dbcap.exporting.proof import images_in
from dbcap.testing.processes import until


@pytest.mark.parametrize(
    ("there", "fewest", "said"),
    [
        (0, 1, "p has no images directly in it, and at least 1 is needed; choose another folder"),
        (1, 2, "p has 1 image directly in it, and at least 2 are needed; choose another folder"),
    ],
)
def test_too_few_images(there, fewest, said, samples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p" / "below").mkdir(parents=True)
    (tmp_path / "p" / "below" / "a.png").write_bytes(samples[0].read_bytes())
    for number in range(there):
        (tmp_path / "p" / f"{number}.png").write_bytes(samples[0].read_bytes())
    with pytest.raises(UsageError) as caught:
        images_in("p", fewest)
    assert str(caught.value) == said


def test_what_names_no_folder_is_counted_too(samples):
    assert images_in(str(samples[0].parent / "00[0-2].png"), 3) == [str(path) for path in samples[:3]]
    with pytest.raises(UsageError, match=r"00\[0-2\]\.png has 3 images, and at least 4 are needed"):
        images_in(str(samples[0].parent / "00[0-2].png"), 4)


def test_one_that_cannot_be_read_is_named_and_what_to_do_fits(samples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_bytes(samples[0].read_bytes()[:600])
    (tmp_path / "list").write_text("https://example.org/a.png\n")
    for words, said in (
        ("p", "p/a.png: is truncated: the PNG data ends too early; take it out, or mend it"),
        ("@list", "https://example.org/a.png: is a URL; fetch it first"),
    ):
        with pytest.raises(UsageError) as caught:
            images_in(words, 1)
        assert str(caught.value) == said


def test_what_went_wrong_in_the_process_is_said_even_if_it_did_not_listen(tmp_path, monkeypatch):
    (tmp_path / "python").write_text("#!/bin/sh\necho no luck >&2\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(DbcapError, match="the check of starter failed: no luck; --no-check leaves it out"):
        proof.baseline("starter", ["x" * 10**6], False)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_process_ends_with_the_one_that_waits_for_it(number, home, tiny_captioner, tmp_path):
    os.mkfifo(tmp_path / "image")  # which it reads for ever
    script = (
        "import signal, sys\nfrom dbcap.exporting import proof\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "proof.baseline(sys.argv[1], sys.argv[2:], False)"
    )
    words = [sys.executable, "-c", script, str(tiny_captioner), str(tmp_path / "image")]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    written: list[int] = []

    def reads() -> bool:
        try:
            written.append(os.open(tmp_path / "image", os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # nobody has opened it yet
            assert process.poll() is None
        return bool(written)

    def has_ended() -> bool:
        try:
            os.write(written[0], b".")
        except BrokenPipeError:
            return True
        return False

    until(reads)
    assert not has_ended()
    process.send_signal(number)
    assert process.wait() != 0
    until(has_ended)
    os.close(written[0])
