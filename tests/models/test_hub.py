"""From a hub name, a plugin's name or a folder to files, with a hub on loopback and all that can go wrong."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dbcap.config import paths
from dbcap.errors import ModelError, UsageError
from dbcap.files import Lock
from dbcap.models import remote
from dbcap.models.hub import locate
from dbcap.models.reports import cached_models, inspect
from dbcap.plugins import loader

NAME = "nlpconnect/vit-gpt2-image-captioning"
READ = ["config.json", "merges.txt", "preprocessor_config.json", "pytorch_model.bin", "special_tokens_map.json"]
READ += ["tokenizer_config.json", "vocab.json"]


@pytest.fixture
def served(hub, published_model):
    """A hub with the published model and files beside it that nobody needs."""
    started = hub()
    folder = started.repo(NAME)
    shutil.copytree(published_model, folder, dirs_exist_ok=True)
    for name in ("flax_model.msgpack", "tf_model.h5", "model.fp16.safetensors", "onnx/model.onnx", "training_args.pth"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not wanted")
    return started


def get(text=NAME, heard=None, offline=False, **more):
    return locate(text, offline=offline, events=heard, home=paths.cache_dir(), **more)


def show(text=NAME, heard=None, offline=False, **more):
    return inspect(text, offline=offline, events=heard, home=paths.cache_dir(), **more)


def refusal(*arguments, **named):
    """Return the one line of the error that this call must raise."""
    with pytest.raises(ModelError) as failure:
        get(*arguments, **named)
    line = str(failure.value)
    assert "\n" not in line
    assert len(line) < 400
    assert "Traceback" not in line
    return line


def fetched(hub):
    """Return the names of the files that were sent, in order."""
    return [one.path.rsplit("/", 1)[1] for one in hub.requests if one.method == "GET" and "/resolve/" in one.path]


def repo_cache():
    return remote.cache_folder() / f"models--{NAME.replace('/', '--')}"


# ---- download and cache


def test_first_use_fetches_only_what_is_read_and_converts(served, heard, published_model):
    model = get(heard=heard)
    assert sorted(fetched(served)) == READ
    assert fetched(served)[-1] == "pytorch_model.bin"  # so that where the weights are, everything is
    size = sum((published_model / name).stat().st_size for name in READ)
    assert heard.said[0] == f"downloading {NAME} (7 files, 4.8 MB)"
    assert len(heard.said) == 2
    assert "converting" in heard.said[1]
    assert not heard.warned
    (track,) = heard.tracks
    assert (track.total, track.done, track.unit) == (size, size, "bytes")
    assert model.revision == served.commit(NAME)
    assert sorted(file.name for file in model.files) == READ
    assert sum(file.size for file in model.files) == size
    stated = {file.name: file.sha256 for file in model.files}
    assert stated["pytorch_model.bin"] == served.hashes(published_model / "pytorch_model.bin")[1]
    old = torch.load(published_model / "pytorch_model.bin", weights_only=True)
    new = load_file(model.folder / "model.safetensors")
    assert all(torch.equal(new[name], old[name]) for name in new)
    assert (model.folder / "vocab.json").is_file()


def test_the_second_use_asks_once_and_fetches_nothing(served, heard):
    first = get(heard=heard)
    served.requests.clear()
    heard.said.clear()
    assert get(heard=heard) == first
    assert [one.path.split("?")[0] for one in served.requests] == [f"/api/models/{NAME}/revision/main"]
    assert heard.said == []


@pytest.mark.parametrize("how", ["argument", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_asks_nothing(how, served, heard, monkeypatch):
    first = get(heard=heard)
    served.requests.clear()
    if how != "argument":
        monkeypatch.setenv(how, "1")
    assert get(heard=heard, offline=how == "argument") == first
    assert show(heard=heard, offline=how == "argument").cached
    assert served.requests == []


def test_offline_with_a_model_of_another_engine(served, heard):
    missing = refusal(heard=heard, kind="onnx", offline=True)
    get(heard=heard)
    line = refusal(heard=heard, kind="onnx", offline=True)
    assert "is not in the cache" in missing
    assert line == f"{NAME} has no ONNX files in the cache; `dbcap export {NAME} --onnx` makes them of what is there"


def test_offline_and_not_cached(served, heard):
    line = refusal(heard=heard, offline=True)
    assert f"`dbcap models pull {NAME}`" in line
    assert "`--profile starter`" in line
    assert "is not in the cache" in line
    assert served.requests == []


def test_a_cached_model_is_used_when_the_hub_is_out_of_reach(served, heard):
    first = get(heard=heard)
    served.stop()
    heard.said.clear()
    assert get(heard=heard) == first
    assert heard.said == heard.warned == []
    assert "cannot reach the hub" in heard.details[-1]


def test_a_cached_model_is_used_when_the_hub_is_silent(served, heard, monkeypatch):
    """A hub that takes the connection and does not answer is waited for only a little."""
    first = get(heard=heard)
    monkeypatch.setattr("dbcap.models.hub._CHECK_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        assert get(heard=heard) == first
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_in_trouble_is_a_hub_out_of_reach(status, served, heard):
    served.status = status
    line = refusal(heard=heard)
    assert f"HTTP {status}" in line
    assert "dbcap models pull" in line
    served.heal()
    first = get(heard=heard)
    served.status = status
    assert get(heard=heard) == first


def test_out_of_reach_and_not_cached(served, heard):
    served.stop()
    line = refusal(heard=heard)
    assert f"cannot reach the hub at {served.url}" in line
    assert f"`dbcap models pull {NAME}`" in line
    assert "`--profile starter`" in line


def test_something_that_is_no_hub(served, heard):
    served.status = 200  # as a captive portal answers
    assert "is no model hub" in refusal(heard=heard)


def test_a_cached_commit_needs_no_network(served, heard):
    commit = served.commit(NAME)
    first = get(f"{NAME}@{commit}", heard)
    assert first.revision == commit
    served.requests.clear()
    assert get(f"{NAME}@{commit}", heard) == first
    assert served.requests == []
    assert "not in the cache" in refusal(NAME, heard, offline=True)  # nobody said that main is this commit


def test_two_revisions(served, heard):
    other = served.repo(NAME, "v2")
    shutil.copytree(served.repo(NAME), other, dirs_exist_ok=True)
    (other / "generation_config.json").write_text('{"max_length": 9}')
    main, second = get(heard=heard), get(f"{NAME}@v2", heard)
    assert main.revision != second.revision == served.commit(NAME, "v2")
    assert main.folder != second.folder
    assert (second.folder / "generation_config.json").is_file()
    assert not (main.folder / "generation_config.json").exists()
    assert fetched(served).count("pytorch_model.bin") == 1  # one blob for both
    served.stop()
    assert get(heard=heard) == main
    assert get(f"{NAME}@v2", heard) == second


def test_a_branch_that_moved_is_fetched_anew_and_the_old_commit_stays(served, heard):
    old = get(heard=heard)
    (served.repo(NAME) / "special_tokens_map.json").write_text("{}")
    served.requests.clear()
    heard.said.clear()
    new = get(heard=heard)
    assert new.revision == served.commit(NAME) != old.revision
    assert fetched(served) == ["special_tokens_map.json"]
    assert heard.said[0] == f"downloading {NAME} (1 file, 2 bytes)"
    assert get(f"{NAME}@{old.revision}", heard, offline=True).folder == old.folder
    assert get(heard=heard, offline=True) == new


def test_a_half_made_download_does_not_spoil_the_cached_revision(served, heard, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    old = get(heard=heard)
    torch.save({"weight": torch.ones(50_000)}, served.repo(NAME) / "pytorch_model.bin")
    served.cut("pytorch_model.bin", 1000)
    assert "broke off" in refusal(heard=heard)
    assert get(heard=heard, offline=True) == old


def test_what_other_programs_left_incomplete_is_completed(served, heard):
    """Another tool may have fetched the configuration only, and named the branch."""
    from huggingface_hub import hf_hub_download

    hf_hub_download(NAME, "config.json", cache_dir=remote.cache_folder(), endpoint=served.url)
    assert "not in the cache" in refusal(heard=heard, offline=True)
    served.requests.clear()
    get(heard=heard)
    assert sorted(fetched(served)) == sorted(set(READ) - {"config.json"})


def test_other_tools_find_what_was_fetched(served, heard):
    from huggingface_hub import hf_hub_download

    get(heard=heard)
    path = hf_hub_download(NAME, "vocab.json", cache_dir=remote.cache_folder(), local_files_only=True)
    assert Path(path).read_bytes() == (served.repo(NAME) / "vocab.json").read_bytes()


def test_safetensors_are_preferred_and_need_no_conversion(hub, tiny_captioner, heard):
    started = hub()
    shutil.copytree(tiny_captioner, started.repo("org/tiny"), dirs_exist_ok=True)
    (started.repo("org/tiny") / "pytorch_model.bin").write_bytes(b"not wanted")
    model = get("org/tiny", heard, allow_pickle=False)
    assert "pytorch_model.bin" not in fetched(started)
    assert model.folder == remote.snapshot_folder("org/tiny", model.revision)
    assert len(heard.said) == 1


def test_shards_are_fetched_with_their_index(hub, tiny_captioner, heard):
    from transformers import VisionEncoderDecoderModel

    started = hub()
    folder = started.repo("org/shards")
    shutil.copytree(tiny_captioner, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    VisionEncoderDecoderModel.from_pretrained(tiny_captioner).save_pretrained(folder, max_shard_size="150KB")
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    model = get("org/shards", heard)
    assert set(shards) < {file.name for file in model.files}
    whole = VisionEncoderDecoderModel.from_pretrained(tiny_captioner).state_dict()
    loaded = VisionEncoderDecoderModel.from_pretrained(model.folder).state_dict()
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)


def test_sub_folders_on_the_hub_are_no_hindrance(served, heard):
    assert "onnx/model.onnx" in remote.ask(NAME, "main", timeout=5, events=heard).files
    get(heard=heard)


# ---- refusals


def test_a_missing_repository(served, heard):
    line = refusal("nlpconnect/vit-gpt3", heard)
    assert "no model nlpconnect/vit-gpt3" in line
    assert "hf auth login" in line


def test_a_missing_repository_with_a_token(served, heard, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_something")
    assert "no model org/none" in refusal("org/none", heard)


def test_an_unknown_revision(served, heard):
    assert f"{NAME} has no revision v9" in refusal(f"{NAME}@v9", heard)


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository(status, served, heard):
    served.gate(NAME, status)
    line = refusal(heard=heard)
    assert "is gated" in line
    assert f"{served.url}/{NAME}" in line
    assert "`hf auth login`" in line


def test_a_token_that_is_refused(served, heard):
    served.status = 403
    line = refusal(heard=heard)
    assert "HTTP 403" in line
    assert "`hf auth login`" in line


def test_what_is_cached_serves_though_the_hub_no_longer_shows_it(served, heard):
    first = get(heard=heard)
    shutil.rmtree(served.repo(NAME))
    assert get(heard=heard) == first
    assert "no model" in heard.warned[0]


def test_a_repository_without_a_configuration(served, heard):
    (served.repo(NAME) / "config.json").unlink()
    assert f"{NAME} has no config.json" in refusal(heard=heard)
    assert fetched(served) == []


def test_a_repository_without_weights_that_are_read(served, heard):
    (served.repo(NAME) / "pytorch_model.bin").unlink()
    line = refusal(heard=heard)
    assert "no weights" in line
    assert "flax_model.msgpack" in line
    assert fetched(served) == []


def test_a_diffusion_pipeline_is_no_captioner(hub, heard):
    started = hub()
    (started.repo("org/painter") / "model_index.json").write_text("{}")
    assert "diffusion pipeline" in refusal("org/painter", heard)
    report = show("org/painter", heard)
    assert (report.kind, report.cached) == ("diffusion", False)
    assert report.problem == "org/painter has no weights that dbcap reads for its unet"
    assert "diffusion pipeline, no captioner" in show("org/painter", heard, kind="captioner").problem


def test_pickled_weights_are_refused_before_they_are_fetched(served, heard):
    line = refusal(heard=heard, allow_pickle=False)
    assert "allow_pickle = false" in line
    assert fetched(served) == []
    get(heard=heard)
    assert "allow_pickle = false" in refusal(heard=heard, allow_pickle=False)
    assert "allow_pickle = false" in refusal(heard=heard, allow_pickle=False, offline=True)


def test_no_room_on_the_disk(served, heard, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    line = refusal(heard=heard)
    assert "needs 4.8 MB" in line
    assert "has 1.0 MB left" in line
    assert "HF_HOME" in line
    assert fetched(served) == []


# ---- faults on the way


def test_a_connection_cut_once_is_taken_up_where_it_broke(served, heard, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    served.cut("pytorch_model.bin", 1_000_000, times=1)
    get(heard=heard)
    assert fetched(served).count("pytorch_model.bin") == 2
    assert heard.tracks[0].done == heard.tracks[0].total
    assert not heard.warned
    assert any("resume" in line for line in heard.details)


def test_a_connection_that_stays_cut(served, heard, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    served.cut("pytorch_model.bin", 1_000_000)
    line = refusal(heard=heard)
    assert "broke off while pytorch_model.bin" in line
    assert "finished files are kept" in line
    assert list(repo_cache().rglob("*.incomplete")) == []
    served.heal()
    served.requests.clear()
    get(heard=heard)
    assert fetched(served) == ["pytorch_model.bin"]


def test_a_file_that_arrives_damaged_is_not_kept(served, heard):
    served.corrupt("pytorch_model.bin")
    assert f"pytorch_model.bin of {NAME} arrived damaged" in refusal(heard=heard)
    served.heal()
    served.requests.clear()
    get(heard=heard)
    assert fetched(served) == ["pytorch_model.bin"]


def test_progress_of_xet(heard):
    """Loopback has no Xet; its reporter, which drives the same bar, is run by hand."""
    from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

    with heard.track("Downloading", 100, "bytes") as track:
        bar = remote.bar_class(track)
        with XetDownloadProgressReporter(reconstruction_desc="x", total=100, log_level=30, tqdm_class=bar) as reporter:
            for content, wire in ((0, 40), (60, 50), (100, 70)):
                reporter.update_progress(
                    SimpleNamespace(
                        total_bytes=100,
                        total_bytes_completed=content,
                        total_transfer_bytes_completed=wire,
                        total_bytes_completion_rate=1.0,
                        total_transfer_bytes_completion_rate=None,
                    )
                )
    assert track.done == bar.told == 100


PULL = """
import sys
from dbcap.config import paths
from dbcap.errors import ModelError
from dbcap.events import Silent
from dbcap.models.hub import locate
class Say(Silent):
    def say(self, message):
        print(message, flush=True)
try:
    print(locate(sys.argv[1], offline="offline" in sys.argv, events=Say(), home=paths.cache_dir()).folder)
except ModelError as error:
    print(f"error: {error}")
    sys.exit(1)
"""


def wait_for(what):
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def unfinished():
    return [path for path in (repo_cache() / "blobs").glob("*.incomplete") if path.stat().st_size]


def test_a_killed_download(served, heard, child):
    served.slow("pytorch_model.bin", 300_000)
    small_chunks = "from huggingface_hub import constants\nconstants.DOWNLOAD_CHUNK_SIZE = 2**16\n"
    killed = child(small_chunks + PULL, NAME)
    # The small files come first, each unfinished for a moment too.
    wait_for(lambda: fetched(served)[-1:] == ["pytorch_model.bin"] and unfinished())
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (left,) = unfinished()
    served.heal()
    served.requests.clear()
    model = get(heard=heard)
    assert fetched(served) == ["pytorch_model.bin"]  # from its first byte; the finished ones were kept
    assert not left.exists()
    assert list(repo_cache().rglob("*.incomplete")) == []
    assert (model.folder / "model.safetensors").is_file()


def test_what_another_program_is_fetching_is_left_alone(served, heard):
    """The hf command holds the lock of the blob it writes: its file must not vanish under it."""
    blobs = repo_cache() / "blobs"
    blobs.mkdir(parents=True)
    alive, dead = blobs / f"{'a' * 64}.12345678.incomplete", blobs / f"{'b' * 64}.incomplete"
    alive.touch()
    dead.touch()
    with Lock(remote.cache_folder() / ".locks" / repo_cache().name / f"{'a' * 64}.lock"):
        get(heard=heard)
    assert alive.exists()
    assert not dead.exists()


def test_two_at_once_fetch_once(served, heard, child):
    served.slow("pytorch_model.bin", 4_000_000)
    first = child(PULL, NAME)
    wait_for(lambda: fetched(served)[-1:] == ["pytorch_model.bin"])
    found = []
    second = threading.Thread(target=lambda: found.append(get(heard=heard)))
    second.start()
    out, err = first.communicate()
    second.join()
    assert err == ""
    assert first.returncode == 0
    assert out.splitlines()[-1] == str(found[0].folder)
    assert sorted(fetched(served)) == READ
    assert "another dbcap is fetching" in heard.said[0]


def test_a_write_that_fails(served, child, tmp_path):
    """A file size limit stands in for a full disk: the same call fails in the same way."""
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\n"
    process = child(limit + PULL, NAME)
    out, err = process.communicate()
    assert process.returncode == 1
    assert err == ""
    assert out.splitlines()[-1].startswith(f"error: cannot write {NAME} into {remote.cache_folder()}: File too large; ")


def test_nothing_is_printed_and_the_environment_of_the_import_does_not_matter(served, child):
    for arguments in ([NAME], [NAME], [NAME, "offline"]):
        out, err = child(PULL, *arguments).communicate()
        assert err == ""
    assert len(out.splitlines()) == 1
    served.cut("pytorch_model.bin", 100)
    (served.repo(NAME) / "pytorch_model.bin").write_bytes(b"x" * 5000)
    process = child("import time; time.sleep = lambda _: None\n" + PULL, NAME)
    out, err = process.communicate()
    assert err == ""
    assert process.returncode == 1
    assert "broke off" in out.splitlines()[-1]


def answers(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def test_a_hub_that_tells_no_sizes(home, shared, tmp_path, published_model, heard, monkeypatch):
    """The small hub of the shared folder: one revision, a bare listing."""
    root = tmp_path / "root"
    shutil.copytree(published_model, root / NAME)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, shared / "tools/hub.py", root, str(port)])
    try:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        wait_for(lambda: answers(port))
        model = get(heard=heard)
        assert heard.said[0] == f"downloading {NAME} (7 files, 4.8 MB)"
        assert heard.tracks[0].done == heard.tracks[0].total
        assert model.revision == "a" * 40
        report = show(heard=heard)
        assert (report.kind, report.cached) == ("captioner", True)
    finally:
        process.kill()
        process.wait()
    assert get(heard=heard) == model


# ---- folders and plugins


@pytest.fixture
def plugin(home, tmp_path, tiny_captioner, monkeypatch):
    """An installed plugin with a model named `toy`."""
    place = tmp_path / "site"
    (place / "toys-1.0.dist-info").mkdir(parents=True)
    (place / "toys-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (place / "toys-1.0.dist-info/entry_points.txt").write_text("[dbcap.plugins]\ntoys = toys_plugin:Toys\n")
    (place / "toys_plugin.py").write_text(
        "from pathlib import Path\nfrom dbcap.plugins.api import Model, Plugin\n"
        "class Toys(Plugin):\n"
        "    def models(self):\n"
        f"        yield Model('toy', 'captioner', Path({str(tiny_captioner)!r}), 'A toy', 'MIT')\n"
        "        yield Model('gone', 'captioner', Path('/none/at/all'))\n"
        "        yield Model('paint', 'diffusion', Path('/none/at/all'))\n"
    )
    monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("DBCAP_PLUGINS", "toys")
    loader.reset()
    yield
    loader.reset()
    sys.modules.pop("toys_plugin", None)


def test_a_plugins_model(plugin, tiny_captioner, heard):
    model = get("toy", heard, offline=True)
    assert model.folder == tiny_captioner
    assert len(model.revision) == 64
    report = show("toy", heard, offline=True)
    assert (report.licence, report.description, report.kind, report.cached) == ("MIT", "A toy", "captioner", True)
    assert report.revision == model.revision
    assert report.problem == ""


def test_names_that_are_not_there(plugin, heard):
    line = refusal("toyy", heard)
    assert "no installed plugin provides a model named toyy" in line
    assert "did you mean toy?" in line
    assert "folder of the model gone is missing" in refusal("gone", heard)
    assert "the model paint is no captioner" in refusal("paint", heard)
    assert "the model toy is no diffusion model" in refusal("toy", heard, kind="diffusion")


def test_a_word_is_a_folder_where_no_plugin_has_it(plugin, tiny_captioner, heard, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("toy", "mine"):
        shutil.copytree(tiny_captioner, name)
    assert get("toy", heard).spec.kind == "named"
    mine = get("mine", heard)
    assert (mine.spec.kind, mine.folder) == ("folder", tmp_path / "mine")
    assert show("mine", heard).folder == tmp_path / "mine"
    Path("file").touch()
    with pytest.raises(UsageError, match="is a file"):
        get("file", heard)


def test_a_folders_revision_is_its_content(home, tiny_captioner, heard, tmp_path):
    first = Path(shutil.copytree(tiny_captioner, tmp_path / "first"))
    before = get(str(first), heard)
    assert before.folder == first
    moved = first.rename(tmp_path / "moved")
    (moved / "notes.txt").write_text("not read by a loader")
    assert get(str(moved), heard).revision == before.revision
    assert get(str(moved), heard).files == before.files
    with (moved / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert get(str(moved), heard).revision != before.revision


def test_a_folder_with_pickled_weights(home, published_model, heard):
    model = get(str(published_model), heard)
    assert model.folder != published_model
    assert (model.folder / "model.safetensors").is_file()
    assert "pytorch_model.bin" in {file.name for file in model.files}
    assert "allow_pickle = false" in refusal(str(published_model), heard, allow_pickle=False)


def test_a_folder_without_a_model(home, heard, tmp_path):
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path}/empty has no config.json" in refusal(f"{tmp_path}/empty", heard)
    report = show(f"{tmp_path}/empty", heard)
    assert (report.kind, report.files, report.revision) == ("unknown", (), "")
    assert "no config.json" in report.problem


def test_a_damaged_configuration(home, heard, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        show(str(tmp_path), heard)


# ---- reports


def test_show_tells_all_without_fetching_weights(served, heard, published_model):
    report = show(heard=heard)
    assert sorted(file.name for file in report.files) == READ
    assert (report.kind, report.model_type, report.licence) == ("captioner", "vision-encoder-decoder", "apache-2.0")
    assert (report.cached, report.folder, report.pickled, report.problem) == (False, None, True, "")
    assert report.revision == served.commit(NAME)
    assert report.size == sum((published_model / name).stat().st_size for name in READ)
    weights = next(file for file in report.files if file.name == "pytorch_model.bin")
    assert weights.sha256 == served.hashes(published_model / "pytorch_model.bin")[1]
    assert fetched(served) == []
    get(heard=heard)
    report = show(heard=heard)
    assert report.cached
    assert report.folder == remote.snapshot_folder(NAME, report.revision)
    offline = show(heard=heard, offline=True)
    assert (offline.revision, offline.files, offline.kind) == (report.revision, report.files, "captioner")


def test_show_of_what_is_not_there(served, heard):
    for offline in (True, False):
        if not offline:
            served.stop()
        with pytest.raises(ModelError, match="dbcap models pull"):
            show(heard=heard, offline=offline)


def test_the_list_of_the_cache(served, heard, tiny_captioner, home):
    assert cached_models() == []
    shutil.copytree(tiny_captioner, served.repo("org/tiny"), dirs_exist_ok=True)
    get("org/tiny", heard)
    get(heard=heard)
    remote.small_file(NAME, served.commit(NAME), "README.md", heard)
    (served.repo(NAME) / "special_tokens_map.json").write_text("{}")
    remote.small_file(NAME, served.commit(NAME), "config.json", heard)
    models = cached_models()
    assert [(one.repo, one.refs, one.kind, one.complete) for one in models if one.repo == "org/tiny"] == [
        ("org/tiny", ("main",), "captioner", True)
    ]
    mine = {one.complete: one for one in models if one.repo == NAME}
    assert mine[True].refs == ("main",)
    assert mine[False].refs == ()
    assert mine[True].size > 4_000_000 > mine[False].size
    assert json.loads((mine[False].folder / "config.json").read_text())
    assert show(heard=heard, offline=True).licence == "apache-2.0"  # the card is in the cache now
