"""Signals in training: one asks for an end, two end."""

from __future__ import annotations

import os
import signal

import pytest

from dbcap.errors import Interrupted
from dbcap.training.signals import Signals

ENDS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers():
    """What the shell of these tests has."""
    before = [signal.getsignal(number) for number in ALL]
    yield before
    for number, handler in zip(ALL, before, strict=True):
        signal.signal(number, handler)


def got(signals, *numbers):
    with signals.listening():
        for number in numbers:
            os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), ENDS)
def test_the_first_one_is_noted_and_the_second_ends(number, code, handlers):
    signals = Signals()
    got(signals, number)
    assert signals.exit_code == code
    with pytest.raises(Interrupted) as end:
        got(signals, number)
    assert end.value.exit_code == code
    assert [signal.getsignal(one) for one in ALL] == handlers


def test_the_second_one_says_how_it_ends():
    signals = Signals()
    with pytest.raises(Interrupted) as end:
        got(signals, signal.SIGINT, signal.SIGTERM)
    assert (signals.exit_code, end.value.exit_code) == (130, 143)


def test_what_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = Signals()
    got(signals, signal.SIGHUP, signal.SIGHUP)
    assert signals.exit_code is None


def test_a_wish_for_a_checkpoint_ends_nothing():
    signals = Signals()
    with signals.listening():
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
    assert (signals.checkpoint, signals.exit_code) == (True, None)


def test_before_training_a_wish_is_noted_and_an_end_is_an_end(handlers):
    signals = Signals()
    with signals.noting():
        signal.raise_signal(signal.SIGUSR1)
        assert signals.checkpoint
        assert signal.getsignal(signal.SIGINT) == handlers[0]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(one) for one in ALL] == handlers
    assert signals.exit_code is None


def test_signals_are_taken_back_from_who_took_them_meanwhile():
    signals = Signals()
    with signals.listening():
        for number in ALL:
            signal.signal(number, signal.SIG_IGN)
        signals.listen()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
    assert (signals.exit_code, signals.checkpoint) == (143, True)
