"""`dbcap resume` as the shell sees it."""

from __future__ import annotations

import pytest

from dbcap import runs

QUICK = ["--steps", "2", "--sample-every", "0", "--validate-every", "0", "--precision", "32"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch) -> None:
    """On a busy machine two threads wait for each other longer than they work."""
    import torch

    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_it_goes_on_in_a_fresh_process(cli, process, tiny_dataset):
    stopped = cli("train", str(tiny_dataset), "--name", "rex", *QUICK, "--max-time", "0s")
    assert (stopped.code, stopped.out) == (5, "")
    assert stopped.err.splitlines()[-1] == "step 1 of 2: --max-time is over; `dbcap resume rex` goes on"
    result = process("resume")
    assert (result.code, result.out) == (0, f"{runs.folder() / 'rex' / 'final'}\n")
    assert result.err.splitlines()[-1] == "rex is trained; `dbcap generate PROMPT --model run:rex` uses it"
    again = cli("resume", "rex")
    assert (again.code, again.out, again.err) == (0, result.out, "rex is finished: nothing is left to do\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no unfinished run; `dbcap runs list` shows those there are"),
        (["rex"], "there is no run rex; `dbcap runs list` shows those there are"),
        (["a", "b"], "resume goes on with one run at a time"),
        (["--from", "best"], "--from and --name go together: a checkpoint, and the new run that begins there"),
        (["--from", "first", "--name", "b"], "--from: 'first' is not allowed: it must be a step, best or last"),
        (["--lr", "1"], "dbcap resume: no such option: --lr; "),
    ],
)
def test_wrong_usage_is_one_line(words, message, cli):
    result = cli("resume", *words)
    assert (result.code, result.error.startswith(message)) == (2, True), result.err
    assert not runs.folder().exists()
