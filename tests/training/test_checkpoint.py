"""Checkpoints: whole or not at all, and known by their hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from dbcap.errors import DbcapError, Interrupted
from dbcap.runs import Run
from dbcap.training import checkpoint
from dbcap.training.checkpoint import DamagedError, Folders


def content(step=1):
    """Return what Lightning hands over, or might."""
    random = torch.Generator().manual_seed(step)

    def draw(*shape):
        return torch.randn(shape, generator=random)

    return {
        "epoch": 0,
        "global_step": step,
        "best": {"step": 1, "value": 0.1 + 0.2},
        "nothing": None,
        "loops": {"fit_loop": {"state": {}, "progress": {"ready": [1, 2], "is_last": False}}},
        "lr_schedulers": [{"base_lrs": [1e-4], "lr_lambdas": [None]}],
        "optimizer_states": [
            {"state": {"unet.a": {"step": torch.tensor(3.0), "m": draw(4, 3)}, "unet.b": {}}, "lr": 1e-4}
        ],
        "state_dict": {
            "unet.a": draw(4, 3),
            "unet.b.weight": draw(2, 2, 3, 3).contiguous(memory_format=torch.channels_last),
            "text_encoder.c": draw(5),
        },
        "ema": {"unet.a": draw(4, 3)},
    }


def same(one, other) -> bool:
    """Tell whether two such things are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.fixture
def run(tmp_path) -> Run:
    found = Run(tmp_path / "run")
    found.folder.mkdir()
    return found


def save(run, step=1, **changes) -> Path:
    place = checkpoint.place_of(run.checkpoints, step)
    Folders().save_checkpoint(content(step) | changes, place)
    return place


def everything(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- written and read


def test_what_is_written_is_read(run):
    assert same(Folders().load_checkpoint(save(run)), content())
    plain = {name: value for name, value in content(2).items() if name != "ema"}
    Folders().save_checkpoint(plain, run.checkpoints / "000002")
    assert same(Folders().load_checkpoint(run.checkpoints / "000002"), plain)


def test_what_is_in_the_folder(run):
    folder = save(run)
    files = everything(folder)
    assert sorted(files) == [
        *("ema/unet.safetensors", "optimizer.safetensors", "state.json"),
        *("weights/text_encoder.safetensors", "weights/unet.safetensors"),
    ]
    said = json.loads(files.pop("state.json"))
    assert said["files"] == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert said["lightning"]["best"] == {"step": 1, "value": 0.1 + 0.2}
    with safe_open(folder / "weights" / "unet.safetensors", "pt") as file:
        assert set(file.keys()) == {"a", "b.weight"}
    assert [path.name for path in run.checkpoints.iterdir()] == ["000001"]
    assert folder.stat().st_mode & 0o777 == 0o755


def test_headers_go_into_the_files_of_their_part(run):
    place = run.checkpoints / "000001"
    Folders({"unet": {"format": "pt", "more": "words"}}).save_checkpoint(content(), place)
    for part, said in (("unet", {"format": "pt", "more": "words"}), ("text_encoder", None)):
        with safe_open(place / "weights" / f"{part}.safetensors", "pt") as file:
            assert file.metadata() == said


def test_a_checkpoint_is_the_same_to_the_byte_for_the_same_state(run):
    first = everything(save(run))
    assert everything(save(run)) == first
    assert everything(save(run, 2)) != first


def test_what_has_no_place_in_json_is_refused_by_name(run):
    with pytest.raises(TypeError, match="/loops/odd is a set, which a checkpoint has no place for"):
        save(run, loops={"odd": {1}})
    assert list(run.checkpoints.iterdir()) == []


# ---- failing


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        Interrupted(),
    ],
    ids=["system", "safetensors", "signal"],
)
@pytest.mark.parametrize("number", range(4))
def test_what_fails_half_way_leaves_the_one_before_and_nothing_else(number, error, run, monkeypatch):
    save(run)
    before, count, write = everything(run.folder), iter(range(10)), checkpoint.save_file

    def fail(tensors, path, header):
        if next(count) == number:
            path.write_bytes(b"half a file")
            raise error
        write(tensors, path, header)

    monkeypatch.setattr(checkpoint, "save_file", fail)
    for step in (2, 1):
        with pytest.raises(type(error)):
            save(run, step)
        assert everything(run.folder) == before
        count = iter(range(10))
    assert [path.name for path in run.checkpoints.iterdir()] == ["000001"]


def test_a_run_that_was_removed_is_not_made_again(run):
    shutil.rmtree(run.folder)
    with pytest.raises(FileNotFoundError):
        save(run)
    assert not run.folder.exists()


# ---- damage


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json", "weights/unet.safetensors"])
@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_is_found(name, seed, run):
    folder = save(run)
    chance = random.Random(seed)
    data = bytearray((folder / name).read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    (folder / name).write_bytes(data)
    with pytest.raises(DamagedError) as failure:
        checkpoint.verified(folder)
    message = f"the checkpoint {folder} is damaged: {name} is not what was written; an earlier one is used"
    assert str(failure.value).startswith(message)
    with pytest.raises(DamagedError):
        Folders().load_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["weights/unet.safetensors", "weights/text_encoder.safetensors", "ema/unet.safetensors"]
)
def test_a_cut_or_missing_file_is_named(name, run):
    folder = save(run)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    with pytest.raises(DamagedError, match=f"{name} is not what was written"):
        checkpoint.verified(folder)
    (folder / name).unlink()
    with pytest.raises(DamagedError, match=f"{name}: No such file or directory"):
        checkpoint.verified(folder)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"format": 1, "files": {}}', '{"lightning": 1', "\0" * 99])
def test_a_state_that_makes_no_sense(text, run):
    folder = save(run)
    (folder / "state.json").write_text(text)
    with pytest.raises(DamagedError, match=r"state\.json is not what was written"):
        checkpoint.verified(folder)


def test_one_of_another_version_is_not_called_damaged(run, monkeypatch):
    monkeypatch.setattr(checkpoint, "_FORMAT", 2)
    folder = save(run)
    monkeypatch.undo()
    with pytest.raises(
        DbcapError, match=f"another version of dbcap wrote the checkpoint {folder}; use that"
    ) as failure:
        checkpoint.verified(folder)
    assert not isinstance(failure.value, DamagedError)


# ---- which are kept


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(1, None, [5]), (2, None, [4, 5]), (2, 1, [1, 4, 5]), (1, 5, [5]), (9, 3, [1, 2, 3, 4, 5])],
)
def test_the_newest_and_the_best_are_kept(keep, best, left, run):
    for step in range(1, 6):
        save(run, step)
    if best:
        checkpoint.mark_best(run.checkpoints, best)
    checkpoint.prune(run, keep)
    assert list(run.steps()) == left
    assert run.best() == best
    assert {path.name for path in run.checkpoints.iterdir()} - {"best"} == {f"{step:06d}" for step in left}


def test_what_is_not_ours_stays(run):
    for step in (1, 2):
        save(run, step)
    own = ["notes.txt", "000001 of mine/weights.bin", "000009/half", ".hidden/file", ".mine.tmp/file", "-5/state.json"]
    for name in own:
        path = run.checkpoints / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    for left in (".000003.x1y2.tmp", ".000001.gone.tmp"):
        (run.checkpoints / left / "weights").mkdir(parents=True)
    checkpoint.prune(run, 1)
    assert list(run.steps()) == [2]
    assert all((run.checkpoints / name).read_text() == "mine" for name in own)
    assert {path.name for path in run.checkpoints.iterdir()} == {"000002"} | {name.partition("/")[0] for name in own}


def test_the_best_is_a_link_that_is_replaced_at_once(run):
    for step in (1, 2):
        save(run, step)
    (run.checkpoints / ".best.tmp").symlink_to("of a run that was killed")
    for step in (1, 2, 2):
        checkpoint.mark_best(run.checkpoints, step)
        assert (run.checkpoints / "best").readlink() == Path(f"{step:06d}")
        assert run.best() == step
    assert not (run.checkpoints / ".best.tmp").is_symlink()


def test_one_that_was_set_aside_goes_with_the_next(run):
    save(run)
    damaged = save(run, 2)
    checkpoint.set_aside(damaged)
    assert list(run.steps()) == [1]
    assert len(list(run.checkpoints.iterdir())) == 2
    checkpoint.set_aside(save(run, 2))
    save(run, 2)
    checkpoint.prune(run, 5)
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == ["000001", "000002"]


def test_one_at_the_same_place_is_replaced(run):
    save(run)
    found = save(run, best=None)
    assert Folders().load_checkpoint(found)["best"] is None
    Folders().remove_checkpoint(found)
    assert list(run.checkpoints.iterdir()) == []
