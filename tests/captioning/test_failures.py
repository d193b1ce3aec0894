"""A lack of memory is one line, from the command and from Python; other failures stay what they are."""

import numpy as np
import pytest
import torch

from dbcap import Captioner
from dbcap.errors import DbcapError
from dbcap.models.libraries import compiler_errors
from dbcap.models.memory import memory_errors


def test_torch_without_memory_is_one_line():
    with pytest.raises(DbcapError, match="not enough memory for 8 images x 4 beams") as caught:  # noqa: SIM117
        with memory_errors("8 images x 4 beams", "use a smaller --batch-size"):
            torch.empty(2**60)
    assert "smaller --batch-size" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("context", [lambda: memory_errors("it", "no"), compiler_errors])
@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("memory")])
def test_other_failures_are_left(context, error):
    with pytest.raises(type(error)) as caught, context():
        raise error
    assert caught.value is error


def test_python_says_it_in_its_own_words(tiny_captioner, monkeypatch):
    captioner = Captioner.load(tiny_captioner)
    monkeypatch.setattr(captioner._captioner, "generate", lambda *_: torch.empty(2**60))
    with pytest.raises(DbcapError, match="smaller batch_size or fewer beams"):
        captioner.caption(np.zeros((32, 32, 3), np.uint8))
