"""`dbcap export` as the shell sees it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import dbcap_starter
from dbcap.testing.models import write_tiny
from dbcap.testing.processes import until


@pytest.fixture(scope="session")
def starter_export(tmp_path_factory) -> Path:
    """The starter captioner in float32, int8 and int4, compared with float32 on its samples."""
    folder = tmp_path_factory.mktemp("starter")
    words = ["export", "starter", "--int8", "--int4", "--out", "e"]
    done = subprocess.run([sys.executable, "-m", "dbcap", *words], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "e\n"), done.stderr
    (folder / "err").write_text(done.stderr)
    return folder / "e"


def test_the_proof_stands_in_the_table_and_in_the_manifest(starter_export):
    told = json.loads((starter_export / "export.json").read_text())
    assert told["model"]["name"] == "starter"
    assert told["check"]["images"] == 24
    for proof in told["check"]["variants"].values():
        assert proof["captions"] >= 0.95
        assert proof["next_tokens"] >= 0.98
        assert proof["bleu_4"] >= 0.95
        assert proof["cider_d"] >= 9
        assert 20e6 < proof["memory"] < 1e9
    files = {file["name"]: file for file in told["files"]}
    assert files["onnx/decoder_model_merged_int8.onnx"]["ratio"] < 0.3
    assert files["onnx/decoder_model_merged_q4.onnx"]["quantised"] == 1
    assert set(files) == {f"onnx/{path.name}" for path in (starter_export / "onnx").iterdir()}
    table = (starter_export.parent / "err").read_text()
    assert all(words in table for words in ("ratio", "quant.", "decoder_model_merged_quantized.onnx"))


MEASURED = ("latency", "memory", "next_tokens", "captions", "cider_d", "bleu_4", "agreement", "sha256", "ratio", "size")
GOLDEN = Path(__file__).parents[1] / "golden" / "export.json"


def shape_of(value, key=""):
    """Return a document with the kinds of what was measured, or comes with the machine and its libraries."""
    if key in MEASURED or (isinstance(value, str) and key in ("dbcap", "revision")):
        return type(value).__name__
    if isinstance(value, dict):
        inner = "sha256" if key in ("host", "made with") else ""
        return {name: shape_of(one, inner or name) for name, one in value.items()}
    return [shape_of(one) for one in value] if isinstance(value, list) else value


def test_the_manifest_has_the_form_that_others_read(starter_export):
    found = shape_of(json.loads((starter_export / "export.json").read_text()))
    text = json.dumps(found, indent=2) + "\n"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), "if that is meant, run it with UPDATE_GOLDEN=1"


def test_captions_are_those_of_torch_and_torch_is_not_imported(starter_export, tmp_path):
    samples = dbcap_starter.samples()
    script = (
        "import sys\nfrom dbcap.cli.app import run\ncode = run(sys.argv[1:])\n"
        "print({'torch', 'transformers', 'diffusers'} & set(sys.modules), code, file=sys.stderr)"
    )
    words = ["caption", str(samples), "--model", str(starter_export)]
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.endswith("set() 0\n")
    expected = [json.loads(line) for line in (samples / "metadata.jsonl").read_text().splitlines()]
    said = {Path(path).name: caption for path, caption in (line.split("\t") for line in done.stdout.splitlines())}
    assert sum(said[row["file_name"]] == row["text"] for row in expected) >= 23


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing is asked for: add --onnx"),
        (["a", "b", "--onnx"], "one model at a time"),
        (["--onnx", "--no-fp32"], "--no-fp32 leaves nothing"),
        (["--onnx", "--calibrate", "photos"], "--calibrate needs --int8"),
        (["--onnx", "--no-check", "--max-drop", "0"], "--max-drop needs a check"),
        (["--onnx", "--max-drop", "2"], "--max-drop"),
        (["./nothing", "--onnx"], "no such folder"),
        (["--single-file", "--onnx"], "--single-file and --onnx do not go together"),
        (["--single-file", "--int8"], "--single-file and --int8 do not go together"),
        (["--lora", "kohya", "--fp16"], "--lora and --fp16 do not go together"),
        (["--torch-bnb4", "--torch-bnb8"], "--torch-bnb4 and --torch-bnb8 do not go together"),
        (["starter", "--diffusers", "--check-images", "photos"], "--check-images is for ONNX files of captioners"),
        (["starter", "--single-file", "--no-fp32"], "--no-fp32 is for ONNX files of captioners, and not for"),
        (["starter", "--lora", "kohya"], "starter is no LoRA"),
        (["x.safetensors", "--lora", "kohya", "--base", "."], "--base is for a whole model in one file"),
        (["--lora", "peft"], "--lora"),
        (["run:nobody", "--single-file"], "nobody"),
    ],
)
def test_what_cannot_go_together_is_one_line(cli, project, words, said):
    result = cli("export", *words)
    assert result.code in (1, 2)
    assert said in result.error
    assert not list(project.iterdir())


@pytest.mark.parametrize("flag", ["--check-images", "--calibrate"])
def test_images_that_cannot_be_read_are_named_before_anything_is_loaded(cli, project, flag):
    (project / "p").mkdir()
    (project / "p" / "x.png").write_bytes(next(dbcap_starter.samples().glob("*.png")).read_bytes()[:600])
    for folder, said in (("p", "p/x.png: is truncated"), ("nothing", "no such file: nothing")):
        result = cli(
            "export", "starter", "--int8", flag, folder, *(() if flag == "--check-images" else ("--no-check",))
        )
        assert result.code == 2
        assert said in result.error
        assert "holds" not in result.error
    assert not (project / "starter-export").exists()


def test_what_is_there_is_refused_before_anything_is_loaded(cli, project):
    (project / "starter-export").mkdir()
    (project / "starter-export" / "mine").write_text("mine")
    for words in ((), ("--force",)):
        result = cli("export", "starter", "--onnx", *words)
        assert result.code == 2
        assert "starter-export" in result.error
    assert os.listdir(project / "starter-export") == ["mine"]


def test_more_changed_captions_than_allowed_leave_nothing(cli, project, tmp_path):
    write_tiny(tmp_path / "model")  # random weights: near ties everywhere
    words = ("--int4", "--no-fp32", "--check-images", str(dbcap_starter.samples()), "--out", "e")
    result = cli("export", str(tmp_path / "model"), *words, "--max-drop", "0")
    assert result.code == 1
    assert "of the captions of q4 differ" in result.error
    assert not list(project.iterdir())


DIFFUSION = str(Path(dbcap_starter.__file__).parent / "diffusion")


@pytest.mark.parametrize(
    ("number", "words", "out"),
    [
        (signal.SIGINT, ("starter", "--int8", "--no-check"), "e"),
        (signal.SIGKILL, ("starter", "--int8", "--no-check"), "e"),
        (signal.SIGINT, (DIFFUSION, "--onnx"), "e"),
        (signal.SIGTERM, ("starter", "--diffusers"), "e"),
        (signal.SIGINT, ("starter", "--torch-bnb8"), "e"),
        (signal.SIGINT, ("starter", "--single-file"), "e.safetensors"),
        (signal.SIGKILL, ("starter", "--single-file"), "e.safetensors"),
    ],
)
def test_a_signal_leaves_nothing_under_the_name(tmp_path, number, words, out):
    command = [sys.executable, "-m", "dbcap", "export", *words, "--out", out]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until(lambda: list(tmp_path.glob(f".{out}.*.tmp")))
    process.send_signal(number)
    _, said = process.communicate()
    assert not (tmp_path / out).exists()
    if number != signal.SIGKILL:
        # Python ends itself by SIGINT where that came while it compiled a string: a shell says 130 of both.
        assert process.returncode in (128 + number, -number)
        assert f"nothing was written to {out}" in said
        assert not list(tmp_path.iterdir())


def test_a_single_file_goes_beside_what_is_in_a_folder(cli, project):
    (project / "models").mkdir()
    (project / "models" / "mine").write_text("mine")
    result = cli("export", "starter", "--single-file", "--out", "models")
    assert (result.code, result.out) == (0, "models/starter.safetensors\n")
    assert sorted(os.listdir(project / "models")) == ["mine", "starter.safetensors"]
    assert "size" in result.err
    assert "agree" not in result.err
    again = cli("export", "starter", "--single-file", "--out", "models/starter.safetensors")
    assert again.code == 2
    assert "models/starter.safetensors is there already" in again.error
    assert cli("export", "starter", "--single-file", "--out", "models/starter.safetensors", "--force").code == 0
    (project / "own.safetensors").write_bytes(b"mine")
    refused = cli("export", "starter", "--single-file", "--out", "own.safetensors", "--force")
    assert refused.code == 2
    assert "own.safetensors is no export" in refused.error
    assert (project / "own.safetensors").read_bytes() == b"mine"


def test_a_format_that_is_typed_replaces_those_of_the_settings(cli, project):
    (project / "dbcap.toml").write_text('[export]\nlora = "kohya"\nint8 = true\ncalibrate = "photos"\n')
    assert cli("export", "starter", "--diffusers", "--out", "d").code == 0
    result = cli("export", "starter", "--onnx", "--no-check", "--out", "o")
    assert result.code == 0, result.err
    assert sorted(os.listdir(project / "o" / "onnx")) == ["decoder_model_merged.onnx", "encoder_model.onnx"]


def test_what_is_exported_is_never_replaced(cli, project):
    assert cli("export", "starter", "--diffusers", "--out", "d").code == 0
    before = (project / "d" / "export.json").read_bytes()
    refused = cli("export", "./d", "--diffusers", "--out", "d", "--force")
    assert refused.code == 2
    assert "d is or holds what is to be exported" in refused.error
    assert (project / "d" / "export.json").read_bytes() == before
    assert cli("export", "./d", "--single-file", "--out", "s.safetensors").code == 0
    again = cli("export", "s.safetensors", "--single-file", "--fp16", "--out", "s.safetensors", "--force")
    assert again.code == 2
    assert "is or holds what is to be exported" in again.error


def test_settings_of_a_profile_do_not_stand_in_the_way_of_other_formats(cli, project):
    (project / "dbcap.toml").write_text('[export]\nmax_drop = 0.1\nlayout = "optimum"\n')
    assert cli("export", "starter", "--diffusers", "--out", "d").code == 0
    assert (project / "d" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
