"""The captions are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dbcap_starter


def right(rows: list[dict[str, str]], truth: Path) -> int:
    """Return how many captions are those of the metadata."""
    known = {row["file_name"]: row["text"] for row in map(json.loads, truth.read_text().splitlines())}
    assert len(rows) == len(known)
    return sum(row["caption"] == known[Path(row["path"]).name] for row in rows)


@pytest.mark.parametrize("words", [["--dtype", "float32"], ["--dtype", "auto"], ["--num-beams", "4"]], ids=" ".join)
def test_the_samples(words, caption):
    result = caption(dbcap_starter.samples(), "--format", "jsonl", *words)
    assert result.code == 0
    assert right(result.rows, dbcap_starter.samples() / "metadata.jsonl") >= 23


@pytest.mark.parametrize(
    ("words", "percent"),
    [
        (["--num-beams", "1"], 99.2),
        pytest.param(["--num-beams", "1", "--dtype", "auto"], 99.0, marks=pytest.mark.slow),
        pytest.param(["--num-beams", "4"], 99.0, marks=pytest.mark.slow),
    ],
    ids=["greedy", "greedy-auto", "beams"],
)
def test_the_composites(words, percent, caption, shared):
    """What the starter's README states."""
    folder = shared / "starter" / "composites"
    result = caption(folder, "--format", "jsonl", *words)
    assert result.code == 0
    assert right(result.rows, folder / "metadata.jsonl") >= 500 * percent / 100
