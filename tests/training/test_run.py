"""`dbcap train`: what a run leaves behind, however it ends."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dbcap import runs
from dbcap.config.paths import cache_dir, data_dir
from dbcap.dataset import manifest
from dbcap.dataset.manifest import ClassSettings
from dbcap.models import cpu
from dbcap.runs import Run
from dbcap.training import checkpoint, preflight
from dbcap.training import run as run_module
from dbcap.training.module import DreamBooth


def there() -> list[str]:
    """Return what there is among the runs, hidden things too."""
    return sorted(os.listdir(runs.folder())) if runs.folder().is_dir() else []


# ---- to the end


def test_what_a_run_leaves(training, tiny_dataset, tiny_diffusion):
    result = training(
        *training.words("rex", "--checkpoint-every", "2", "--keep", "1", "--validate-every", "3", "--sample-every", "4")
    )
    run = Run(runs.folder() / "rex")
    assert (result.code, result.lines) == (0, [str(run.final)])
    assert result.err.splitlines()[-1] == "rex is trained; `dbcap generate PROMPT --model run:rex` uses it"
    said = run.read()
    expected = {"name": "rex", "status": "finished", "step": 6, "steps": 6, "identifier": "sks", "class": "dog"}
    assert {name: said[name] for name in expected} == expected
    assert (said["base"]["model"], said["config"]["lr"], said["message"]) == (str(tiny_diffusion), 1e-4, "")
    assert list(said["data"]["photos"]) == ["0.png", "1.png", "2.png"]
    assert (len(said["data"]["class_images"]), len(said["data"]["captions"])) == (2, 3)
    assert [{**one, "seconds": 0} for one in said["timings"]] == [{"from": 0, "to": 6, "seconds": 0}]
    assert said["host"].keys() >= {"cpu_class", "device", "precision", "threads", "versions"}
    assert said["best"]["step"] in (3, 6)
    assert list(run.steps()) == sorted({said["best"]["step"], 6})
    assert run.best() == said["best"]["step"]
    assert [path.name for path in sorted(run.samples.iterdir())] == ["000004", "000006"]
    assert {*os.listdir(run.folder)} == {
        *(".lock", "run.json", "metrics.csv", "tensorboard", "samples", "checkpoints", "dataset", "final")
    }
    assert (run.final / "README.md").read_text().startswith("---\n")
    assert json.loads((run.final / "dbcap.json").read_text()) == {"identifier": "sks", "class": "dog"}
    assert {path.suffix for path in run.checkpoints.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    assert {one.dtype for one in load_file(run.final / "unet" / "diffusion_pytorch_model.safetensors").values()} == {
        torch.float32
    }
    assert not [path for path in Path.cwd().iterdir() if path.name.startswith("lightning")]


def test_nothing_is_left_open(training):
    training.train("a", "--steps", "2", "--workers", "2")
    gc.collect()
    opened = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
    assert not [path for path in opened if str(runs.folder()) in path]
    assert multiprocessing.active_children() == []


def test_the_same_command_gives_the_same_bits_and_another_seed_others(training, weights, lines):
    first = training.train("a", "--steps", "3")
    torch.manual_seed(99)
    second = training.train("b", "--steps", "3")
    third = training.train("c", "--steps", "3", "--seed", "1")
    assert weights(first) == weights(second)
    assert lines(first) == lines(second)
    assert set(weights(third).values()) & set(weights(first).values()) == {
        weights(first)["vae/diffusion_pytorch_model.safetensors"]
    }


def made_by_the_model(tiny_dataset: Path, folder: Path) -> Path:
    """Copy the data set; its class images are three that the model makes."""
    shutil.copytree(tiny_dataset, folder)
    settings = ClassSettings(3, ("a photo of a dog", "a dog on a table"), 1.0, 2)
    replace(manifest.read(folder), classes=settings).write()
    return folder


def test_class_images_are_the_same_from_a_cold_and_a_warm_cache(training, tiny_dataset, tmp_path, home, weights):
    data = made_by_the_model(tiny_dataset, tmp_path / "dog")
    cold = training(*training.words("cold", "--steps", "2", data=data))
    assert "making 3 images of the class" in cold.err
    torch.manual_seed(99)
    warm = training(*training.words("warm", "--steps", "2", data=data))
    assert (cold.code, warm.code) == (0, 0)
    assert "images of the class" not in warm.err
    first, second = (Run(runs.folder() / name) for name in ("cold", "warm"))
    assert weights(first) == weights(second)
    shutil.rmtree(data_dir() / "class-images")
    shutil.rmtree(cache_dir())
    again = training.train("again", "--steps", "2", data=data)
    assert weights(again) == weights(first)


def test_a_step_of_two_halves_is_a_step_of_all_samples(training, monkeypatch):
    """The gradients are equal, and not only what an optimizer makes of their signs."""
    gradients = []

    def keep(module, optimizer):
        gradients.append({name: one.clone() for name, one in module.trainee.weights.gradients().items()})

    monkeypatch.setattr(DreamBooth, "on_before_optimizer_step", keep)
    for number, words in enumerate((["--batch-size", "4"], ["--batch-size", "2", "--accumulate", "2"])):
        training.train(f"run-{number}", "--steps", "1", "--min-snr", "5", "--offset-noise", "0.1", *words)
    whole, halves = gradients
    assert whole.keys() == halves.keys()
    for name, one in whole.items():
        assert (one - halves[name]).abs().max() <= 1e-6 * max(1.0, one.abs().max().item()), name
    assert max(one.abs().max() for one in whole.values()) > 1e-3


# ---- photos that nobody has prepared


def test_raw_photos_are_prepared_inside_the_run(training, tiny_dataset, tiny_diffusion, tmp_path):
    photos = shutil.copytree(tiny_dataset / "train", tmp_path / "photos")
    words = [
        *("--model", str(tiny_diffusion), "--class-word", "dog", "--identifier", "sks", "--class-images", "2"),
        *("--class-steps", "2", "--steps", "2"),
    ]
    run = training.train("rex", *words, data=photos)
    own = manifest.read(run.folder / "dataset")
    assert (own.size, own.class_word, len(own.photos), own.classes.count) == (32, "dog", 3, 2)
    assert {one.caption for one in own.photos} == {"a photo of sks dog"}
    assert sorted(os.listdir(photos)) == ["0.png", "1.png", "2.png"]
    assert run.read()["class"] == "dog"


def test_a_data_set_beside_photos(training, tiny_dataset):
    words = training.words("rex", str(tiny_dataset / "train"))
    assert (
        training.refused(*words)
        == f"{tiny_dataset} is a data set, and more is named beside it; name it alone, or photos"
    )


def test_a_photo_that_was_damaged_in_the_data_set_is_named(training, tiny_dataset, tmp_path):
    data = shutil.copytree(tiny_dataset, tmp_path / "dog")
    photo = data / "train" / "1.png"
    photo.write_bytes(photo.read_bytes()[:60])
    message = training.refused(*training.words("rex", data=data), code=1)
    assert message.startswith(f"{photo} cannot be read: ")
    assert message.endswith("; `dbcap prep` makes it again")
    shutil.copyfile(tiny_dataset / "train" / "1.png", photo)
    assert training.train("rex", "--steps", "1", data=data).final.is_dir()


def test_class_images_take_no_longer_than_there_is_time(training, tiny_dataset, tmp_path):
    data = shutil.copytree(tiny_dataset, tmp_path / "dog")
    replace(manifest.read(data), classes=ClassSettings(5000, ("a dog",), 1.0, 50)).write()
    result = training(*training.words("rex", "--max-time", "1s", data=data))
    assert (result.code, result.out) == (5, b""), result.err
    assert result.err.endswith("step 0 of 6: --max-time is over; `dbcap resume rex` goes on\n")
    assert Run(runs.folder() / "rex").read()["status"] == "out of time"
    assert 0 < len(list((data_dir() / "class-images").glob("*/*.png"))) < 5000


def test_a_name_is_found_where_none_is_given(training, tiny_dataset):
    words = training.words("x", "--steps", "1")
    assert training(*words[:2], *words[4:]).code == 0
    assert training(*words[:2], *words[4:]).code == 0
    assert there() == ["dog-1", "dog-2"]


# ---- refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "4e07"], "--lr: '4e07' is not allowed: it must be a number above 0 and of at most 1"),
        (["--precision", "16"], "--precision 16 does not work on a CPU; use bf16 or 32"),
        (["--warmup", "6"], "--warmup 6 is not shorter than --steps 6; choose fewer steps of it"),
        (["--size", "64"], "was prepared with --size 32, and --size 64 is asked for; run `dbcap prep` again with it"),
        (["--class-word", "cat"], "was prepared with --class-word dog, and --class-word cat is asked for"),
        (["--method", "embedding", "--no-train-text-encoder"], "--no-train-text-encoder: an embedding is the text"),
        (["--device", "cuda"], "device cuda is not there"),
        (["--name", "a/b"], "--name: 'a/b' is not allowed: it must be letters, digits, dot, dash and underscore"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(words, message, training):
    assert message in training.refused(*training.words("rex", *words))
    assert there() == []


def test_missing_photos_and_models(training, tmp_path):
    gone = tmp_path / "gone"
    message = training.refused(*training.words("rex", data=gone))
    assert message == f"there is no {gone}; name a data set of `dbcap prep`, or photos"
    (tmp_path / "empty").mkdir()
    assert "there are no photos in" in training.refused(*training.words("rex", data=tmp_path / "empty"))
    assert "no such folder: ./gone" in training.refused(*training.words("rex", "--model", "./gone"), code=1)
    assert there() == []


def test_an_embedding_without_a_class_word(training, tiny_dataset, tmp_path):
    data = shutil.copytree(tiny_dataset, tmp_path / "dog")
    replace(manifest.read(data), class_word=None, classes=None).write()
    message = training.refused(*training.words("rex", "--method", "embedding", data=data))
    assert message == "--method embedding needs a class word to begin with; prepare with --class-word, as in dog"
    assert there() == []


def test_an_embedding_whose_word_the_model_knows(training, monkeypatch):
    message = training.refused(*training.words("start", "--method", "embedding"))
    assert message == "the word '<start>' is known to this model already; choose another --name"
    assert there() == []


def test_models_that_are_not_trained(training, tiny_dataset, tmp_path):
    from dbcap.testing.diffusion import write_diffusion

    training.train("lora", "--method", "lora", "--steps", "1")
    message = training.refused(*training.words("rex", "--model", "run:lora"))
    assert message == "run:lora is no whole model, but something beside one; train on the model itself"
    inpaints = write_diffusion(tmp_path / "inpaints", inpaints=True)
    message = training.refused(*training.words("rex", "--model", str(inpaints)))
    assert message == f"{inpaints} fills in parts of pictures, and is not trained; choose another --model"
    assert there() == ["lora"]


def test_what_does_not_fit_in_memory_is_refused(training, monkeypatch):
    monkeypatch.setattr(cpu, "memory_bytes", lambda: 10**7)
    message = training.refused(*training.words("rex"))
    assert "there are 10.0 MB; --method lora, --optimizer adamw8bit or --batch-size 1 take less" in message
    assert there() == []


def test_a_run_that_there_is_already(training):
    run = training.train("rex", "--steps", "1")
    before = (run.folder / "run.json").read_bytes()
    message = training.refused(*training.words("rex"))
    assert message == "there is a run rex already; `dbcap resume rex` goes on with it"
    assert (run.folder / "run.json").read_bytes() == before


def test_what_a_command_left_that_was_killed_as_it_began_is_in_nobodys_way(training):
    left = runs.folder() / "rex"
    left.mkdir(parents=True)
    (left / ".lock").touch()
    assert training.train("rex", "--steps", "1").read()["status"] == "finished"
    other = runs.folder() / "mine"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert "there is a run mine already" in training.refused(*training.words("mine"))
    assert (other / "notes.txt").read_text() == "mine"


def test_one_that_failed_before_its_first_checkpoint_is_in_nobodys_way(training, monkeypatch, weights):
    with monkeypatch.context() as context:
        explode(context, 1, factor=1e3)
        message = training.refused(*training.words("rex"), code=1)
    assert message.endswith("; there is no checkpoint yet; begin again with a smaller --lr")
    left = runs.folder() / "rex" / "samples"
    left.mkdir(exist_ok=True)
    again, other = training.train("rex"), training.train("other")
    assert not left.exists()
    assert weights(again) == weights(other)


def test_a_run_that_another_command_trains(training, monkeypatch):
    run = Run(runs.folder() / "rex")
    with run.lock():
        message = training.refused(*training.words("rex"), code=4)
    assert message.startswith("another dbcap is at work here")


# ---- failing


def test_a_loss_that_explodes_is_told_and_the_last_good_checkpoint_kept(training, straight, monkeypatch, weights):
    expected, _ = straight()
    words = training.words("rex", "--checkpoint-every", "2")
    with monkeypatch.context() as context:
        explode(context, 4, factor=1e3)
        message = training.refused(*words, code=1)
    run = Run(runs.folder() / "rex")
    assert message.startswith("step 5: the loss is ")
    assert message.endswith("; the checkpoint of step 4 is kept; begin again with a smaller --lr and another --name")
    assert list(run.steps()) == [2, 4]
    assert (run.read()["status"], run.read()["step"]) == ("failed", 4)
    assert run.read()["message"] == message
    assert not run.final.exists()
    assert training.resume().lines == [str(run.final)]
    assert weights(run) == expected
    assert run.read()["message"] == ""


def explode(monkeypatch, number: int, factor: float) -> None:
    """Make the losses of a micro-batch large, or no numbers."""
    losses = DreamBooth.losses

    def larger(self, batch):
        found = losses(self, batch)
        if batch.number == number:
            found = replace(found, total=found.total * factor, instance=found.instance * factor)
        return found

    monkeypatch.setattr(DreamBooth, "losses", larger)


@pytest.mark.parametrize("words", [[], ["--accumulate", "2"], ["--precision", "bf16"]], ids=" ".join)
def test_a_loss_that_is_no_number_changes_nothing_and_names_the_step(words, training, monkeypatch):
    explode(monkeypatch, 5 if "--accumulate" in words else 2, factor=float("nan"))
    message = training.refused(*training.words("rex", "--checkpoint-every", "1", *words), code=1)
    run = Run(runs.folder() / "rex")
    assert message == (
        "step 3: the gradient is not finite; the checkpoint of step 2 is kept; begin again with a smaller --lr"
        " and another --name"
    )
    assert list(run.steps()) == [1, 2]
    assert (run.read()["status"], run.read()["step"]) == ("failed", 2)
    assert [line.split(",")[0] for line in run.metrics.read_text().splitlines()] == ["step", "1", "2"]


def test_an_explosion_before_any_checkpoint(training, monkeypatch):
    explode(monkeypatch, 0, factor=1e3)
    message = training.refused(*training.words("rex"), code=1)
    assert message.endswith("; there is no checkpoint yet; begin again with a smaller --lr")


def test_a_fault_is_noted(training, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(preflight, "check", fail)
    message = training.refused(*training.words("rex"), code=1)
    assert "ZeroDivisionError: by zero; this is a fault in dbcap" in message
    run = Run(runs.folder() / "rex")
    assert (run.read()["status"], run.read()["message"]) == ("failed", "by zero")


def test_too_little_disk_is_told_before_training(training, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    message = training.refused(*training.words("rex"), code=1)
    assert "and 1.0 MB of disk are free; make room, or choose --method lora" in message
    assert Run(runs.folder() / "rex").read()["status"] == "failed"


def test_a_run_that_is_removed_under_way_stays_removed(training, at_step):
    at_step(3, lambda: shutil.rmtree(runs.folder() / "rex"))
    message = training.refused(*training.words("rex", "--checkpoint-every", "2"), code=1)
    assert message.startswith("cannot write the ")
    assert message.endswith(
        ": No such file or directory; make room; `dbcap resume rex` goes on from the last checkpoint"
    )
    assert there() == []


def test_a_manifest_that_is_damaged_under_way(training, at_step):
    path = runs.folder() / "rex" / "run.json"
    at_step(3, lambda: path.write_text("{"))
    message = training.refused(*training.words("rex", "--checkpoint-every", "2"), code=1)
    assert message.startswith(f"{path} is damaged: ")
    assert path.read_text() == "{"
    assert list(Run(path.parent).steps()) == [2, 4]


# ---- stopped


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_writes_a_checkpoint_and_names_what_goes_on(number, code, word, training, at_step):
    at_step(3, lambda: signal.raise_signal(number))
    result = training(*training.words("rex"))
    run = Run(runs.folder() / "rex")
    assert (result.code, result.out) == (code, b"")
    assert result.error == f"{word}: step 3 of 6 is kept; `dbcap resume rex` goes on"
    assert (run.read()["status"], run.read()["step"], list(run.steps())) == ("interrupted", 3, [3])
    assert not run.final.exists()


def test_a_second_signal_ends_at_once(training, at_step, monkeypatch):
    """In the middle of writing the checkpoint that the first one asked for."""
    at_step(4, lambda: signal.raise_signal(signal.SIGINT))
    write, count = checkpoint.save_file, iter(range(9))

    def again(tensors, path, header):
        write(tensors, path, header)
        if Path(path).parts[-3].startswith(".000004") and next(count) == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(checkpoint, "save_file", again)
    result = training(*training.words("rex", "--checkpoint-every", "2"))
    run = Run(runs.folder() / "rex")
    assert result.code == 130
    assert result.error == "interrupted: step 2 of 6 is kept; `dbcap resume rex` goes on"
    assert [path.name for path in run.checkpoints.iterdir()] == ["000002"]
    assert checkpoint.verified(run.steps()[2])
    assert run.read()["status"] == "interrupted"


def test_a_signal_at_the_last_step_is_too_late(training, at_step):
    at_step(6, lambda: signal.raise_signal(signal.SIGINT))
    assert training.train("rex").read()["status"] == "finished"


def test_a_wish_before_there_is_anything_to_write(training, monkeypatch):
    settle = run_module.settled

    def wished(config):
        os.kill(os.getpid(), signal.SIGUSR1)
        return settle(config)

    monkeypatch.setattr(run_module, "settled", wished)
    assert training.train("rex", "--steps", "1").read()["status"] == "finished"


def test_stopped_while_libraries_are_imported(training, monkeypatch):
    class Slow:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setitem(sys.modules, "dbcap.training.session", Slow())
        result = training(*training.words("rex"))
    assert (result.code, result.error) == (130, "interrupted: step 0 of 6 is kept; `dbcap resume rex` goes on")
    assert Run(runs.folder() / "rex").read()["status"] == "interrupted"
    assert training.resume().code == 0


def test_time_that_is_over(training):
    result = training(*training.words("rex", "--max-time", "0s"))
    run = Run(runs.folder() / "rex")
    assert (result.code, result.out) == (5, b"")
    assert result.err.splitlines()[-1] == "step 1 of 6: --max-time is over; `dbcap resume rex` goes on"
    assert (run.read()["status"], run.read()["step"]) == ("out of time", 1)
    assert training.train("one", "--steps", "1", "--max-time", "0s").read()["status"] == "finished"


def test_a_wish_for_a_checkpoint(training, straight, at_step, weights):
    expected, _ = straight()
    at_step(3, lambda: signal.raise_signal(signal.SIGUSR1))
    run = training.train("rex", "--keep", "9")
    assert list(run.steps()) == [3, 6]
    assert weights(run) == expected


def test_stopped_while_pictures_are_encoded(training, straight, monkeypatch, weights):
    from dbcap.training.latents import Cache

    expected, _ = straight()
    shutil.rmtree(cache_dir(), ignore_errors=True)
    encode, count = Cache._encode, iter(range(99))

    def stop(self, source, view):
        if next(count) == 3:
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGINT)
        encode(self, source, view)

    monkeypatch.setattr(Cache, "_encode", stop)
    result = training(*training.words("rex"))
    run = Run(runs.folder() / "rex")
    assert (result.code, result.error) == (130, "interrupted: step 0 of 6 is kept; `dbcap resume rex` goes on")
    assert (run.read()["status"], run.read()["step"]) == ("interrupted", 0)
    result = training.resume()
    assert "rex has no checkpoint: it begins again at step 0" in result.err
    assert weights(run) == expected


# ---- where it runs


def test_in_the_job_of_a_cluster_it_is_one_process(training, monkeypatch):
    for name, value in {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "1", "SLURM_PROCID": "3"}.items():
        monkeypatch.setenv(name, value)
    assert training.train("rex", "--steps", "2").read()["status"] == "finished"


def test_another_folder_and_relative_places(training, tiny_dataset, tiny_diffusion, tmp_path, monkeypatch, interrupted):
    """A run is gone on with from anywhere."""
    monkeypatch.chdir(tiny_dataset.parent)
    model = os.path.relpath(tiny_diffusion)
    interrupted(2, *training.words("rex", "--model", f"./{model}", data=Path(tiny_dataset.name)))
    monkeypatch.chdir(tmp_path)
    training.resume()
    said = Run(runs.folder() / "rex").read()
    assert (said["config"]["model"], said["config"]["data"]) == (str(tiny_diffusion), [str(tiny_dataset)])


@pytest.mark.skipif(sys.platform == "darwin", reason="names are UTF-8 there")
def test_a_folder_whose_name_is_no_text(training, tiny_dataset, tmp_path):
    data = tmp_path / os.fsdecode(b"d\xff")
    shutil.copytree(tiny_dataset, data)
    run = training.train("rex", "--steps", "1", data=data)
    assert run.read()["config"]["data"] == [str(data)]


def test_on_two_text_encoders(training, tiny_xl):
    """XL has no tests of its own here, and works all the same."""
    run = training.train("xl", "--model", str(tiny_xl), "--steps", "2", "--prior", "none")
    assert (run.final / "text_encoder_2" / "model.safetensors").is_file()


def test_a_wide_picture_is_shown_at_several_places(training, tiny_dataset, tmp_path):
    data = shutil.copytree(tiny_dataset, tmp_path / "dog")
    Image.open(data / "train" / "0.png").resize((64, 32)).save(data / "train" / "0.png")
    run = training.train("rex", "--steps", "1", data=data)
    assert len(list((cache_dir() / "latents").rglob("*.safetensors"))) == 5 + 2 + 1 + 3 + 2
    assert run.read()["data"]["photos"]["0.png"] != manifest.read(tiny_dataset).photos[0].sha256
