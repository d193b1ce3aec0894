"""The table of metrics: each step once, whatever became of it."""

from __future__ import annotations

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbcap.training import metrics
from dbcap.training.metrics import COLUMNS, Table

HEAD = ",".join(COLUMNS) + "\n"


def row(step: int, value: float = 0.5) -> str:
    return f"{step},{value},,,,,,,,\n"


def steps(path) -> list[int]:
    return [int(one["step"]) for one in metrics.read(path)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.csv"


def test_a_line_for_each_step_at_once(path):
    table = Table(path, 0)
    assert path.read_text() == HEAD
    table.log_metrics({"loss": 1 / 3, "lr": 2e-6, "seconds": 12.0}, 1)
    assert path.read_text() == HEAD + "1,0.333333333,,,2e-06,,12,,,\n", "nothing waits in memory"
    table.log_metrics({"loss": float("nan"), "validation": 0.25}, 2)
    table.save()
    table.finalize("success")
    table.close()
    table.close()
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [one["step"] for one in rows] == ["1", "2"]
    assert (rows[1]["loss"], rows[1]["validation"], rows[1]["prior"]) == ("nan", "0.25", "")
    assert metrics.read(path) == rows


@pytest.mark.parametrize("start", [0, 1, 2, 3, 9])
def test_what_comes_after_the_checkpoint_goes(path, start):
    path.write_text(HEAD + row(1) + row(2) + row(3))
    with_more = Table(path, start)
    with_more.log_metrics({"loss": 7.0}, start + 1)
    with_more.close()
    kept = min(start, 3)
    assert steps(path) == [*range(1, kept + 1), start + 1]
    assert path.read_text().startswith(HEAD + "".join(map(row, range(1, kept + 1))))


@given(cut=st.integers(0, 40))
def test_half_a_line_is_none(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("metrics") / "metrics.csv"
    last = row(4, 0.123456789)
    path.write_text(HEAD + row(1) + row(2) + row(3) + last[: min(cut, len(last) - 1)])
    table = Table(path, 9)
    table.log_metrics({"loss": 1.0}, 4)
    table.close()
    assert steps(path) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "text",
    [
        HEAD + row(1) + "\0" * 5000 + "\n" + row(2),
        HEAD + row(1) + '"' + "x" * 200_000 + "\n" + row(2),
        HEAD + row(1) + "garbage\n\n1,2\n" + "1," * 20 + "\n" + row(2),
        HEAD + row(1) + row(1) + row(2),
        row(1) + row(2),
        (HEAD + row(1) + row(2)).replace("\n", "\r\n"),
    ],
    ids=["zeros", "quote", "garbage", "twice", "no head", "Windows"],
)
def test_of_a_damaged_table_the_whole_lines_are_kept(path, text):
    path.write_bytes(text.encode() + b"\xff\xfe\n")
    Table(path, 9).close()
    assert path.read_text() == HEAD + row(1) + row(2)


def test_there_may_be_none(path):
    assert metrics.read(path) == []
    Table(path, 5).close()
    assert steps(path) == []
