"""`dbcap models` against a hub on loopback; fetching itself is tested with dbcap.models."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from dbcap.config.paths import cache_dir

REPO = "org/name"


@pytest.fixture
def server(hub, tiny_captioner):
    """A hub with a captioner, a revision of it, and a model that is none."""
    started = hub()
    shutil.copytree(tiny_captioner, started.repo(REPO), dirs_exist_ok=True)
    (started.repo(REPO) / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (started.repo(REPO) / "training_args.bin").write_bytes(b"never fetched")
    shutil.copytree(tiny_captioner, started.repo(REPO, "v2"), dirs_exist_ok=True)
    (started.repo("org/other") / "config.json").write_text('{"model_type": "bert"}')
    return started


def rows(result):
    return [line.split("\t") for line in result.out.splitlines()]


def test_show_tells_all_without_fetching_the_weights(cli, server):
    result = cli("models", "show", REPO, "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert {key: found[key] for key in ("model", "kind", "model_type", "revision", "licence", "pickled", "cached")} == {
        "model": REPO,
        "kind": "captioner",
        "model_type": "vision-encoder-decoder",
        "revision": server.commit(REPO),
        "licence": "apache-2.0",
        "pickled": False,
        "cached": False,
    }
    files = {file["name"]: file for file in found["files"]}
    weights = server.repo(REPO) / "model.safetensors"
    assert files["model.safetensors"] == {
        "name": "model.safetensors",
        "bytes": weights.stat().st_size,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    assert "training_args.bin" not in files
    assert not [
        request for request in server.requests if "model.safetensors" in request.path and request.method == "GET"
    ]


def test_show_as_a_table(cli, server):
    result = cli("models", "show", f"{REPO}@v2")
    assert result.code == 0
    found = rows(result)
    assert ["kind", "captioner"] in found
    assert ["revision", server.commit(REPO, "v2")] in found
    assert ["cached", "no"] in found
    assert [row[0] for row in found if len(row) == 3][-1] == "model.safetensors"


def test_pull_fetches_what_is_read_and_prints_the_folder(cli, server):
    code, out, err = cli("models", "pull", REPO)
    assert code == 0
    folder = out.removesuffix("\n")
    assert err.splitlines()[-1] == f"{REPO} is ready, at revision {server.commit(REPO)[:12]}"
    names = {path.name for path in Path(folder).iterdir()}
    assert "model.safetensors" in names
    assert "training_args.bin" not in names
    assert json.loads(cli("models", "show", REPO, "--json").out)["cached"] is True
    server.stop()
    assert cli("models", "pull", REPO, "--offline").out == out
    assert cli("models", "show", REPO, "--offline").code == 0


def test_list_shows_plugins_models_and_the_hubs_cache(cli, server):
    starters = rows(cli("models", "list"))
    assert [starter[:2] for starter in starters] == [["starter", "captioner"], ["starter", "diffusion"]]
    assert {starter[4] for starter in starters} == {"plugin"}
    cli("models", "pull", REPO)
    (*_, pulled) = rows(cli("models", "list"))
    assert pulled[:3] == [REPO, "captioner", server.commit(REPO)[:12]]
    assert pulled[4:] == ["hub cache", "main"]
    found = json.loads(cli("models", "list", "--json").out)
    assert [model["model"] for model in found] == ["starter", "starter", REPO]
    assert found[0]["licence"]
    assert found[1]["licence"]
    assert found[2]["bytes"] > 10_000


def test_a_pipeline_is_listed_shown_and_pulled_whole(cli, server, tiny_diffusion):
    shutil.copytree(tiny_diffusion, server.repo("org/painter"), dirs_exist_ok=True)
    commit = server.commit("org/painter")
    found = json.loads(cli("models", "show", "org/painter", "--json").out)
    assert (found["kind"], found["model_type"], found["revision"], found["cached"]) == (
        "diffusion",
        "StableDiffusionPipeline",
        commit,
        False,
    )
    sizes = {file["name"]: file["bytes"] for file in found["files"]}
    assert sizes["unet/config.json"] == (tiny_diffusion / "unet/config.json").stat().st_size
    assert found["bytes"] == sum(sizes.values())
    code, out, err = cli("models", "pull", "org/painter")
    assert (code, err.splitlines()[-1]) == (0, f"org/painter is ready, at revision {commit[:12]}")
    pulled = Path(out.removesuffix("\n"))
    assert {path.relative_to(pulled).as_posix() for path in pulled.rglob("*") if path.is_file()} == set(sizes)
    (*_, listed) = rows(cli("models", "list"))
    assert listed[:3] == ["org/painter", "diffusion", commit[:12]]
    assert listed[4:] == ["hub cache", "main"]
    server.stop()
    assert cli("models", "pull", "org/painter", "--kind", "diffusion", "--offline").out == out
    refused = cli("models", "pull", "org/painter", "--kind", "captioner", "--offline")
    assert refused.code == 1


def test_an_incomplete_captioner_is_called_so_and_another_model_is_not(cli, server):
    from huggingface_hub import hf_hub_download

    hf_hub_download(REPO, "config.json", endpoint=server.url)
    hf_hub_download("org/other", "config.json", endpoint=server.url)
    (captioner, other) = rows(cli("models", "list"))[2:]
    assert captioner[5] == "incomplete: `dbcap models pull` completes it"
    assert other[:2] == ["org/other", "unknown"]
    assert other[5] == "main"


def test_nothing_is_here(cli, monkeypatch):
    monkeypatch.setenv("DBCAP_PLUGINS", "none")
    from dbcap.plugins import loader

    loader.reset()
    assert cli("models", "list") == (0, "", "no models are here; `dbcap models pull ORG/NAME` fetches one\n")


def test_the_starter_model_needs_no_hub(cli):
    code, out, err = cli("models", "pull", "starter", "--offline")
    assert code == 0
    assert out.endswith("captioner\n")
    assert err.startswith("starter is ready, at revision ")
    assert json.loads(cli("models", "show", "starter", "--json").out)["licence"]


def test_a_name_of_two_models(cli):
    other = "starter is also the name of another model: --kind diffusion"
    for verb in ("pull", "show"):
        assert cli("models", verb, "starter").err.splitlines()[-1] == other
        assert other not in cli("models", verb, "starter", "--kind", "captioner").err
    found = json.loads(cli("models", "show", "starter", "--kind", "diffusion", "--json").out)
    assert (found["kind"], found["model_type"], found["problem"]) == ("diffusion", "StableDiffusionPipeline", "")
    assert found["bytes"] == sum(file["bytes"] for file in found["files"]) > 38_000_000
    assert "unet/diffusion_pytorch_model.safetensors" in [file["name"] for file in found["files"]]
    code, out, _ = cli("models", "pull", "starter", "--kind", "diffusion")
    assert (code, out) == (0, f"{found['folder']}\n")
    assert out.endswith("diffusion\n")


def test_a_folder_can_be_looked_into(cli, tiny_captioner):
    found = json.loads(cli("models", "show", str(tiny_captioner), "--json").out)
    assert (found["kind"], found["folder"]) == ("captioner", str(tiny_captioner))


@pytest.mark.parametrize("verb", ["pull", "show"])
@pytest.mark.parametrize(
    ("spec", "code", "message"),
    [
        ("org/absent", 1, "org/absent"),
        (f"{REPO}@v3", 1, "v3"),
        ("startre", 1, "did you mean starter?"),
        ("a/b/c/d", 2, "a/b/c/d"),
    ],
)
def test_what_cannot_be_had_is_one_line(cli, server, verb, spec, code, message):
    result = cli("models", verb, spec)
    assert (result.code, message in result.error) == (code, True)


def test_a_hub_out_of_reach_names_the_ways_out(cli, server):
    server.stop()
    for words in (["pull", REPO], ["pull", REPO, "--offline"], ["show", REPO]):
        result = cli("models", *words)
        assert result.code == 1
        assert f"`dbcap models pull {REPO}`" in result.error
        assert "--profile starter" in result.error


def test_a_pickled_model_is_converted_into_the_cache_unless_that_is_forbidden(cli, hub, published_model):
    started = hub()
    shutil.copytree(published_model, started.repo(REPO), dirs_exist_ok=True)
    assert json.loads(cli("models", "show", REPO, "--json").out)["pickled"] is True
    result = cli("models", "pull", REPO, "--no-allow-pickle")
    assert result.code == 1
    assert "pickle" in result.error
    code, out, err = cli("models", "pull", REPO)
    assert code == 0
    assert out.startswith(str(cache_dir()))
    assert "pickle" in err
    assert rows(cli("cache", "info"))


def test_one_kind_given_to_the_command_of_the_other_is_one_line(cli, tiny_captioner, tiny_diffusion, tmp_path):
    made = cli("generate", "a cat", "--model", str(tiny_captioner), "--out", str(tmp_path / "out"))
    assert (made.code, made.out) == (1, "")
    assert made.error == f"{tiny_captioner} is a captioner, no diffusion pipeline; choose another --model"
    assert not (tmp_path / "out").exists()
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    captioned = cli("caption", str(tmp_path / "image.png"), "--model", str(tiny_diffusion))
    assert captioned.code == 1
    assert captioned.error == f"{tiny_diffusion} is a diffusion pipeline, no captioner; choose another --model"
