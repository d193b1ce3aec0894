"""Pickled weights become safetensors, once, and no code in them ever runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dbcap.errors import ModelError
from dbcap.models import hashing, layout
from dbcap.models.weights import convert


@pytest.fixture
def published(published_model, tmp_path):
    """A copy of the published layout that a test may change."""
    return Path(shutil.copytree(published_model, tmp_path / "published"))


@pytest.fixture
def bare(tmp_path):
    """Make a folder that holds these weights and nothing else that matters."""

    def make(state, config=None, name="bare", **how):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config or {}))
        torch.save(state, folder / "pytorch_model.bin", **how)
        return folder

    return make


def run(folder, tmp_path, heard, allow_pickle=True):
    files = layout.choose_in(folder, "it")
    return convert(folder, files, cache=tmp_path / "cache", allow_pickle=allow_pickle, events=heard)


def metadata(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return file.metadata()


def test_the_published_layout(published, tmp_path, heard):
    converted = run(published, tmp_path, heard)
    assert sorted(path.name for path in converted.iterdir()) == [
        "config.json",
        "merges.txt",
        "model.safetensors",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    assert len(heard.said) == 1
    assert "pytorch_model.bin" in heard.said[0]
    old = torch.load(published / "pytorch_model.bin", weights_only=True)
    new = load_file(converted / "model.safetensors")
    assert old.keys() - new.keys() == {"decoder.lm_head.weight"}  # tied: stored once
    for name, tensor in new.items():
        assert tensor.dtype == old[name].dtype
        assert torch.equal(tensor, old[name])
    assert len({path.stat().st_mode for path in converted.iterdir()}) == 1
    assert metadata(converted) == {"format": "pt", "decoder.lm_head.weight": "decoder.transformer.wte.weight"}
    for name in ("config.json", "vocab.json"):
        assert (converted / name).read_bytes() == (published / name).read_bytes()


def test_what_transformers_loads_is_what_the_pickle_held(published, tmp_path, heard):
    from transformers import AutoTokenizer, VisionEncoderDecoderModel

    converted = run(published, tmp_path, heard)
    loaded, report = VisionEncoderDecoderModel.from_pretrained(converted, output_loading_info=True)
    assert not report["missing_keys"]
    assert all("masked_bias" in key for key in report["unexpected_keys"])
    old = torch.load(published / "pytorch_model.bin", weights_only=True)
    assert torch.equal(loaded.decoder.lm_head.weight, old["decoder.lm_head.weight"])
    query = loaded.encoder.layers[1].attention.q_proj.weight
    assert torch.equal(query, old["encoder.encoder.layer.1.attention.attention.query.weight"])
    assert AutoTokenizer.from_pretrained(converted)(" red dog").input_ids == [
        json.loads((converted / "vocab.json").read_text())[word] for word in ("Ġred", "Ġdog")
    ]


def test_a_second_call_converts_and_hashes_nothing(published, tmp_path, heard, monkeypatch):
    monkeypatch.setattr(hashing, "_SETTLED", -1.0)
    first = run(published, tmp_path, heard)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    hashed = []
    real = hashing.sha256_of
    monkeypatch.setattr(hashing, "sha256_of", lambda path: hashed.append(path.name) or real(path))
    assert run(published, tmp_path, heard) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert len(heard.said) == 1
    assert "pytorch_model.bin" not in hashed


def test_the_key_is_the_content_and_not_the_place(published, tmp_path, heard):
    first = run(published, tmp_path, heard)
    moved = published.rename(tmp_path / "moved")
    assert run(moved, tmp_path, heard) == first
    (moved / "special_tokens_map.json").write_text("{}")
    edited = run(moved, tmp_path, heard)
    assert edited != first
    assert (edited / "special_tokens_map.json").read_text() == "{}"
    torch.save({"weight": torch.ones(1)}, moved / "pytorch_model.bin")
    assert run(moved, tmp_path, heard) not in (first, edited)


def test_a_folder_with_safetensors_is_left_as_it_is(published, tmp_path, heard):
    (published / "model.safetensors").write_bytes(b"not looked into")
    assert run(published, tmp_path, heard, allow_pickle=False) == published
    assert heard.said == []


@pytest.mark.parametrize("zipped", [True, False])
def test_every_type_and_form_of_tensor(zipped, bare, tmp_path, heard):
    base = torch.arange(24, dtype=torch.float32)
    state = {
        "half": torch.randn(3).half(),
        "brain": torch.randn(2, 2).bfloat16(),
        "double": torch.randn(2).double(),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "long": torch.tensor([1, 2**40]),
        "bool": torch.tensor([True, False]),
        "number": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "empty2": torch.zeros(0),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "block": base,
        "part": base[4:10],
        "overlap": base[6:12],
        "reshaped": base.view(4, 6),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "expanded": torch.ones(1).expand(3),
    }
    converted = run(bare(state, _use_new_zipfile_serialization=zipped), tmp_path, heard)
    new = load_file(converted / "model.safetensors")
    assert new.keys() == state.keys()
    for name, tensor in state.items():
        assert new[name].dtype == tensor.dtype
        assert torch.equal(new[name], tensor), name
    assert metadata(converted) == {"format": "pt"}


@pytest.mark.parametrize("where", ["top", "part"])
def test_shared_tensors_that_are_not_tied_are_both_kept(where, bare, tmp_path, heard):
    shared = torch.randn(4, 2)
    flag = {"tie_word_embeddings": False}
    config = flag if where == "top" else {"decoder": flag, "tie_word_embeddings": True}
    folder = bare({"decoder.wte": shared, "decoder.head": shared, "other": torch.ones(1)}, config)
    new = load_file(run(folder, tmp_path, heard) / "model.safetensors")
    assert torch.equal(new["decoder.wte"], shared)
    assert torch.equal(new["decoder.head"], shared)


def test_the_encoder_decoders_own_flag_does_not_untie_the_decoder(bare, tmp_path, heard):
    shared = torch.randn(4, 2)
    config = {"tie_word_embeddings": False, "decoder": {"tie_word_embeddings": True}}
    converted = run(bare({"decoder.wte": shared, "decoder.head": shared}, config), tmp_path, heard)
    assert load_file(converted / "model.safetensors").keys() == {"decoder.wte"}


def test_shards(published, tmp_path, heard):
    state = torch.load(published / "pytorch_model.bin", weights_only=True)
    whole = run(published, tmp_path, heard)
    names = sorted(state)
    places = {}
    for number in (0, 1):
        shard = f"pytorch_model-0000{number + 1}-of-00002.bin"
        part = {name: state[name].clone() for name in names[number::2]}
        torch.save(part, published / shard)
        places |= dict.fromkeys(part, shard)
    (published / "pytorch_model.bin").unlink()
    (published / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    converted = run(published, tmp_path, heard)
    assert not list(converted.glob("*.index.json"))
    new, old = load_file(converted / "model.safetensors"), load_file(whole / "model.safetensors")
    assert new.keys() == state.keys()
    assert all(torch.equal(new[name], old[name]) for name in old)
    (published / shard).unlink()
    with pytest.raises(ModelError, match=f"has no {shard}"):
        run(published, tmp_path, heard)


@pytest.mark.parametrize("part", ["../outside.bin", "/etc/passwd", 3])
def test_an_index_does_not_lead_out_of_the_folder(part, published, tmp_path, heard):
    (published / "pytorch_model.bin").rename(tmp_path / "outside.bin")
    (published / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": part}}))
    with pytest.raises(ModelError, match="cannot be a shard"):
        run(published, tmp_path, heard)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index(index, published, tmp_path, heard):
    (published / "pytorch_model.bin").unlink()
    (published / "pytorch_model.bin.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"index\.json is damaged"):
        run(published, tmp_path, heard)


# ---- what is refused


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("form", ["torch", "legacy", "protocol 2", "protocol 5", "module"])
def test_code_is_refused_and_never_run(form, bare, tmp_path, heard, recwarn):
    target = tmp_path / "ran"
    payload = {"weight": torch.ones(2), "extra": Evil(str(target))}
    if form == "module":
        payload = torch.nn.Linear(2, 2)
    folder = bare(payload, _use_new_zipfile_serialization=form != "legacy")
    if form.startswith("protocol"):
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(payload, protocol=int(form[-1])))
    with pytest.raises(ModelError, match="holds code") as failure:
        run(folder, tmp_path, heard)
    assert not target.exists()
    message = str(failure.value)
    assert str(folder / "pytorch_model.bin") in message
    assert "\n" not in message
    assert "\033" not in message
    assert "add_safe_globals" not in message
    assert not recwarn.list
    assert not list((tmp_path / "cache/converted").glob("*.tmp"))
    if form in ("torch", "legacy"):
        assert "(posix.mkdir)" in message


@pytest.mark.parametrize("content", ["empty", "text", "truncated", "truncated legacy", "no archive of torch's"])
def test_a_damaged_file(content, bare, tmp_path, heard):
    folder = bare({"weight": torch.ones(1000)}, _use_new_zipfile_serialization="legacy" not in content)
    file = folder / "pytorch_model.bin"
    whole = file.read_bytes()
    if content == "no archive of torch's":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("hello.txt", "hello")
    else:
        file.write_bytes(
            {"empty": b"", "text": b"version https://git-lfs\noid\n"}.get(content, whole[: len(whole) // 2])
        )
    with pytest.raises(ModelError, match="damaged") as failure:
        run(folder, tmp_path, heard)
    assert str(file) in failure.value.message
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("payload", [[torch.ones(1)], {"a": {"b": torch.ones(1)}}, {1: torch.ones(1)}, {"step": 3}])
def test_a_file_of_something_else(payload, bare, tmp_path, heard):
    with pytest.raises(ModelError, match=r"holds no weights|no tensor"):
        run(bare(payload), tmp_path, heard)


def test_a_sparse_tensor(bare, tmp_path, heard):
    with pytest.raises(ModelError, match="sparse"):
        run(bare({"a": torch.eye(3).to_sparse()}), tmp_path, heard)


def test_allow_pickle_false_refuses_even_what_is_converted(published, tmp_path, heard):
    run(published, tmp_path, heard)
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*allow_pickle = false"):
        run(published, tmp_path, heard, allow_pickle=False)


def test_a_cache_that_cannot_be_written(published, tmp_path, heard):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(ModelError, match=r"cannot convert weights.*DBCAP_HOME"):
        run(published, tmp_path, heard)


# ---- several processes, kills, memory

CONVERT = """
import resource, sys, torch
from pathlib import Path
from dbcap.events import Silent
from dbcap.models import layout, weights
if sys.argv[3] == "slow":
    real = weights.save_file
    def slowly(*arguments, **named):
        print("writing", flush=True)
        sys.stdin.readline()
        real(*arguments, **named)
    weights.save_file = slowly
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
class Say(Silent):
    def say(self, message):
        print(message, flush=True)
it = Path(sys.argv[1])
print(weights.convert(it, layout.choose_in(it, "it"), cache=Path(sys.argv[2]), allow_pickle=True, events=Say()))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_two_processes_convert_once(published, tmp_path, heard, child):
    import threading

    first = child(CONVERT, published, tmp_path / "cache", "slow")
    assert "converting" in first.stdout.readline()
    assert first.stdout.readline() == "writing\n"
    found = []
    second = threading.Thread(target=lambda: found.append(run(published, tmp_path, heard)))
    second.start()
    deadline = time.monotonic() + 10
    while not heard.said and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "waiting" in heard.said[0]
    out, err = first.communicate("\n")
    second.join()
    assert err == ""
    assert out.splitlines()[0] == str(found[0])
    assert len(heard.said) == 1
    assert [path.name for path in (tmp_path / "cache/converted").iterdir() if path.is_dir()] == [found[0].name]


def test_what_a_killed_conversion_left_is_removed(published, tmp_path, heard, child):
    killed = child(CONVERT, published, tmp_path / "cache", "slow")
    while killed.stdout.readline() != "writing\n":
        pass
    killed.kill()
    killed.wait()
    assert list((tmp_path / "cache/converted").glob("*.tmp"))
    converted = run(published, tmp_path, heard)
    assert (converted / "model.safetensors").is_file()
    assert not list((tmp_path / "cache/converted").glob("*.tmp"))


def test_memory_stays_near_one_copy(bare, tmp_path, child):
    size = 200 * 2**20
    state = {f"layer.{number}": torch.zeros(size // 80) for number in range(20)}
    out, err = child(CONVERT, bare(state), tmp_path / "cache", "fast").communicate()
    assert err == ""
    assert int(out.splitlines()[-1]) * 1024 < 1.4 * size


# ---- remembered hashes


def test_a_changed_file_is_hashed_anew_even_with_its_old_times(tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "_SETTLED", -1.0)
    file, memory = tmp_path / "weights", tmp_path / "cache/hashes.json"
    file.write_bytes(b"a" * 2**21)
    state = file.stat()
    first = hashing.content_hash(file, memory)
    assert hashing.content_hash(file, memory) == first == hashing.sha256_of(file)
    file.write_bytes(b"b" * 2**21)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert hashing.content_hash(file, memory) == hashing.sha256_of(file) != first


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path):
    file, memory = tmp_path / "weights", tmp_path / "hashes.json"
    file.write_bytes(b"a" * 2**21)
    assert hashing.content_hash(file, memory) == hashing.sha256_of(file)
    assert not memory.exists()


def test_a_blob_of_the_hubs_cache_is_known_by_its_name(tmp_path):
    name = "0" * 64
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / name).write_bytes(b"x" * 2**21)
    link = tmp_path / "model.bin"
    link.symlink_to(f"blobs/{name}")
    assert hashing.content_hash(link, tmp_path / "hashes.json") == name


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 3}'])
def test_a_damaged_memory_remembers_nothing(content, tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "_SETTLED", -1.0)
    file, memory = tmp_path / "weights", tmp_path / "hashes.json"
    file.write_bytes(b"a" * 2**21)
    memory.write_text(content)
    assert hashing.content_hash(file, memory) == hashing.sha256_of(file)
    assert str(file) in json.loads(memory.read_text())


def test_weights_of_the_module_are_detached_from_the_file(bare, tmp_path, heard):
    """The converted file does not need the pickled one any more."""
    folder = bare({"a": torch.ones(3)})
    converted = run(folder, tmp_path, heard)
    shutil.rmtree(folder)
    assert torch.equal(load_file(converted / "model.safetensors")["a"], torch.ones(3))
    assert not layout.choose_in(converted, "it").pickled
