"""What a variant costs and gains: its captions beside those of the model in float32, its latency and its memory."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dbcap import images
from dbcap.captioning import metrics
from dbcap.errors import DbcapError, InputError, UsageError
from dbcap.events import Events
from dbcap.exporting.trial import Task, Trial
from dbcap.inputs import discover, shown

FEWEST = 2
"""Images, below which CIDEr-D is 0 whatever they say."""

_OWN_HINTS = ("missing", "unreadable", "heic-extra")
"""Kinds of InputError whose hint is of use here; those of others are for commands that read images one by one."""


@dataclass(frozen=True)
class Proof:
    """One variant against the model in float32 on torch."""

    captions: float
    """Share of the captions that are equal."""
    next_tokens: float
    """Share of the tokens of float32's greedy captions that are the likeliest next ones here too."""
    cider_d: float
    """CIDEr-D of its captions, those of float32 as references (10: equal)."""
    bleu_4: float
    latency: float
    """Seconds an image, greedily, alone."""
    memory: int
    """The most bytes resident."""


def check_images(folder: str | None) -> list[str]:
    """Return the images to compare on: those of a folder, else the starter's samples, or none where it is missing."""
    if folder is None:
        try:
            from dbcap_starter import samples
        except ImportError:
            return []
        folder = str(samples())
    return images_in(folder, FEWEST)


def images_in(folder: str, fewest: int) -> list[str]:
    """Return the images directly in a folder, or what else names some to `discover`, all of them readable.

    Raises UsageError where there are too few, and for one that cannot be read, which it names.
    """
    found = []
    for source in discover([folder]).sources:
        try:
            if source.error:
                raise source.error
            if source.is_url:
                raise InputError("is a URL", "fetch it first", kind="missing")
            images.read(source.name)
        except InputError as error:
            name = shown(source.name)
            said = error.message if name in error.message else f"{name}: {error.message}"
            raise UsageError(said, error.hint if error.kind in _OWN_HINTS else "take it out, or mend it") from error
        found.append(source.name)
    if len(found) < fewest:
        count = f"{len(found) or 'no'} image{'s' * (len(found) != 1)}{' directly in it' * Path(folder).is_dir()}"
        needed = f"at least {fewest} {'is' if fewest == 1 else 'are'} needed"
        raise UsageError(f"{shown(folder)} has {count}, and {needed}", "choose another folder")
    return found


def baseline(model: str, pictures: Sequence[str], allow_pickle: bool) -> Trial:
    """Caption images with the model as it is, in float32 on torch."""
    return _try(Task(model, "auto", tuple(pictures), allow_pickle=allow_pickle), model)


def prove(
    variants: Sequence[str], folder: Path, pictures: Sequence[str], before: Trial, events: Events
) -> dict[str, Proof]:
    """Compare each variant in a folder with what `baseline` gave."""
    proofs = {}
    with events.track("Comparing captions", len(variants), "variants") as tracker:
        for variant in variants:
            after = _try(Task(f"{folder}:{variant}", "onnx", tuple(pictures), before.greedy), variant)
            proofs[variant] = _compared(before, after)
            tracker.advance()
    return proofs


def _compared(before: Trial, after: Trial) -> Proof:
    references = [[caption] for caption in before.captions]
    same = sum(one == other for one, other in zip(before.captions, after.captions, strict=True))
    right, places = after.next_tokens
    return Proof(
        captions=same / len(references),
        next_tokens=right / max(places, 1),
        cider_d=metrics.cider_d(after.captions, references),
        bleu_4=metrics.bleu(after.captions, references)[3],
        latency=after.latency,
        memory=after.memory,
    )


def _try(task: Task, what: str) -> Trial:
    command = [sys.executable, "-m", "dbcap.exporting.trial"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin
        held, process.stdin = process.stdin, None  # or communicate() would close it, by which the child ends
        try:
            with contextlib.suppress(BrokenPipeError):  # it failed before it read that, and says why
                held.write(f"{json.dumps(asdict(task))}\n".encode())
                held.flush()
            out, err = process.communicate()
        except BaseException:
            process.kill()
            raise
        finally:
            with contextlib.suppress(BrokenPipeError):
                held.close()
    if process.returncode:
        lines = err.decode("utf-8", "replace").strip().splitlines() or [f"exit code {process.returncode}"]
        raise DbcapError(f"the check of {what} failed: {lines[-1]}", "--no-check leaves it out")
    said: dict[str, Any] = json.loads(out)
    tuples: dict[str, Any]
    tuples = {name: tuple(map(_frozen, value)) if isinstance(value, list) else value for name, value in said.items()}
    return Trial(**tuples)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
