"""Images in terminals: which terminal takes them, and that what is written holds the image."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from dbcap.generation.show import protocol, sequence


@pytest.mark.parametrize(
    ("environment", "terminal", "kind"),
    [
        ({"TERM_PROGRAM": "iTerm.app"}, True, "iterm"),
        ({"TERM_PROGRAM": "WezTerm"}, True, "iterm"),
        ({"KITTY_WINDOW_ID": "1"}, True, "kitty"),
        ({"TERM": "xterm-kitty"}, True, "kitty"),
        ({"TERM_PROGRAM": "ghostty"}, True, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, False, ""),
        ({"TERM_PROGRAM": "iTerm.app", "TMUX": "/tmp/x"}, True, ""),
        ({"KITTY_WINDOW_ID": "1", "TERM": "screen"}, True, ""),
        ({"TERM": "xterm-256color"}, True, ""),
        ({}, True, ""),
    ],
)
def test_terminals_that_can(environment, terminal, kind):
    assert protocol(environment, terminal) == kind


def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def test_iterm_gets_the_whole_file():
    match = re.fullmatch(r"\x1b\]1337;File=inline=1;size=(\d+):([A-Za-z0-9+/=]+)\a\n", sequence(noise(), "iterm"))
    data = base64.b64decode(match[2])
    assert len(data) == int(match[1])
    assert list(Image.open(io.BytesIO(data)).getdata()) == list(noise().getdata())


def test_kitty_gets_it_in_pieces():
    pieces = re.findall(r"\x1b_G((?:a=T,f=100,)?)m=([01]);([A-Za-z0-9+/=]*)\x1b\\", sequence(noise(), "kitty"))
    assert len(pieces) > 2
    assert [bool(first) for first, _, _ in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [more for _, more, _ in pieces] == ["1"] * (len(pieces) - 1) + ["0"]
    assert all(len(data) <= 4096 for _, _, data in pieces)
    data = base64.b64decode("".join(data for _, _, data in pieces))
    assert list(Image.open(io.BytesIO(data)).getdata()) == list(noise().getdata())
