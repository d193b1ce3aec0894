"""`dbcap train` as the shell sees it."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from dbcap import runs

QUICK = ["--steps", "2", "--sample-every", "0", "--validate-every", "0", "--precision", "32"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch) -> None:
    """On a busy machine two threads wait for each other longer than they work."""
    import torch

    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_fresh_process_prints_the_folder_of_the_model(process, tiny_dataset):
    result = process("train", str(tiny_dataset), "--name", "rex", *QUICK)
    assert (result.code, result.out) == (0, f"{runs.folder() / 'rex' / 'final'}\n")
    estimate, last = result.err.splitlines()
    assert estimate.startswith("rex: 1.0 M weights are trained; about ")
    assert last == "rex is trained; `dbcap generate PROMPT --model run:rex` uses it"


@pytest.mark.parametrize("method", ["full", "lora", "embedding"])
def test_what_was_trained_makes_pictures(method, cli, tiny_dataset):
    words = ["--method", method, "--checkpoint-every", "1"]
    assert cli("train", str(tiny_dataset), "--name", "rex", *QUICK, *words).code == 0
    for model in ("run:rex", "run:rex@1", "run:rex@last"):
        made = cli("generate", "a [V] {class}", "--model", model, "--steps", "1", "--dtype", "float32")
        assert made.code == 0, made.err
        assert os.path.isfile(made.out.strip())
    shown = json.loads(cli("runs", "show", "rex", "--json").out)
    assert (shown["status"], shown["method"], [one["step"] for one in shown["checkpoints"]]) == (
        *("finished", method),
        [1, 2],
    )


def test_settings_come_from_files_and_assignments(cli, tiny_dataset, project):
    (project / "more.yaml").write_text("train:\n  seed: 5\n  lr: 0.001\n")
    words = ["--config", "more.yaml", "--set", "train.lr=0.002", "--set", "ema=true"]
    assert cli("train", str(tiny_dataset), "--name", "rex", *QUICK, *words).code == 0
    said = runs.find("rex").read()["config"]
    assert (said["seed"], said["lr"], said["ema"]) == (5, 0.002, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone"], "there is no {here}/gone; name a data set of `dbcap prep`, or photos"),
        ([], "dbcap train: missing argument 'DATASET'; `dbcap train --help` shows what it takes"),
        (["{data}", "--steps", "0"], "--steps: '0' is not allowed: it must be an integer of at least 1"),
        (["{data}", "--method", "dreambooth"], "--method: 'dreambooth' is not allowed: it must be one of full, lora"),
        (["{data}", "--max-time", "soon"], "--max-time: 'soon' is not allowed: it must be a time such as 45s, 30m or"),
        (["{data}", "--size", "64"], "{data} was prepared with --size 32, and --size 64 is asked for"),
    ],
)
def test_wrong_usage_is_one_line(words, message, cli, project, tiny_dataset):
    places = {"here": project, "data": tiny_dataset}
    result = cli("train", *(word.format(**places) for word in words))
    assert (result.code, result.error.startswith(message.format(**places))) == (2, True), result.err
    assert runs.every() == []


def test_a_photo_that_cannot_be_read_is_left_out_and_told(cli, tiny_dataset, tiny_diffusion, tmp_path):
    photos = shutil.copytree(tiny_dataset / "train", tmp_path / "photos")
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n")
    words = ["--model", str(tiny_diffusion), "--class-word", "dog", "--identifier", "sks", "--prior", "none"]
    first = cli("train", str(photos), "--name", "rex", *QUICK, *words, "--max-time", "0s")
    assert first.code == 5
    done = cli("resume", "rex")
    assert (done.code, "rex is trained, without 1 photo that failed" in done.err) == (3, True), done.err
    assert cli("resume", "rex").code == 0
