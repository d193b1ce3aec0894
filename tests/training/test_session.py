"""One command's work: what is noted of a run, and what it makes of its settings."""

from __future__ import annotations

import platform
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from dbcap import __version__, runs
from dbcap.dataset import manifest
from dbcap.models import cpu
from dbcap.runs import Run
from dbcap.training.module import DreamBooth
from dbcap.training.session import Session


@pytest.fixture
def modules(monkeypatch):
    """The modules that are trained, as training begins."""
    found, fit = [], Session._fit
    monkeypatch.setattr(Session, "_fit", lambda self, module, *rest: (found.append(module), fit(self, module, *rest)))
    return found


def test_what_is_noted_of_where_it_runs(training):
    host = training.train("rex", "--steps", "1").read()["host"]
    assert (host["cpu"], host["cpu_class"], host["system"]) == (cpu.cpu_name(), cpu.cpu_class(), platform.platform())
    assert (host["device"], host["precision"], host["threads"]) == ("cpu", "float32", 1)
    assert (host["versions"]["dbcap"], host["versions"]["torch"]) == (__version__, torch.__version__)


def test_all_is_noted_before_anything_slow(training, monkeypatch):
    """Of a run that is killed while pictures are encoded too."""

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "_module", stop)
    assert training(*training.words("rex")).code == 130
    said = Run(runs.folder() / "rex").read()
    assert (said["status"], said["identifier"], said["class"]) == ("interrupted", "sks", "dog")
    assert None not in (said["base"], said["data"], said["host"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (False, "images", None, 1.0)),
        (["--gradient-checkpointing", "on", "--prior", "prediction"], (True, "prediction", None, 1.0)),
        (["--min-snr", "5", "--prior-weight", "0.3"], (False, "images", 5.0, 0.3)),
    ],
)
def test_settings_reach_what_they_are_about(words, expected, training, modules):
    training.train("rex", "--steps", "1", *words)
    (module,) = modules
    assert isinstance(module, DreamBooth)
    what = module.objective
    prior = "prediction" if what.by_prediction else "images"
    found = (module.trainee.unet.is_gradient_checkpointing, prior, what.min_snr, what.prior_weight)
    assert found == expected
    assert (what.prediction_type, len(what.alphas)) == ("epsilon", 1000)


def test_the_models_own_schedule_is_used(training, modules, tiny_diffusion, tmp_path):
    model = shutil.copytree(tiny_diffusion, tmp_path / "model")
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"prediction_type": "epsilon"', '"prediction_type": "v_prediction"'))
    training.train("rex", "--steps", "1", "--model", str(model))
    assert modules[0].objective.prediction_type == "v_prediction"


def test_a_caption_that_is_too_long_is_told(training, tiny_dataset, tmp_path):
    data = shutil.copytree(tiny_dataset, tmp_path / "dog")
    found = manifest.read(data)
    text = "a sks dog " + "on a table " * 6
    replace(found, photos=(replace(found.photos[0], caption=text.strip()), *found.photos[1:])).write()
    result = training(*training.words("rex", "--steps", "1", data=data))
    assert result.code == 0
    assert result.err.count("warning: a caption has more than 14 tokens, and its end is not read: a sks dog on") == 1


def test_a_tracker_that_is_not_installed(training, monkeypatch):
    import lightning.pytorch.loggers.wandb as tracker

    monkeypatch.setattr(tracker, "_WANDB_AVAILABLE", False)
    message = training.refused(*training.words("rex", "--steps", "1", "--tracker", "wandb"), code=1)
    assert message == "--tracker wandb needs wandb; run `pip install 'dbcap[wandb]'`"
    training.resume("--set", "train.tracker=none")


def test_files_of_a_lora_and_an_embedding_say_what_they_are(training):
    lora = training.train("one", "--steps", "1", "--method", "lora", "--rank", "2", "--alpha", "3")
    with safe_open(lora.final / "lora.safetensors", "pt") as file:
        said = file.metadata()
        assert {name.partition(".")[0] for name in file.keys()} == {"unet", "text_encoder"}  # noqa: SIM118
    assert said.keys() == {"format", "lora_adapter_metadata", "dbcap"}
    assert '"unet.lora_alpha": 3.0' in said["lora_adapter_metadata"]
    word = training.train("two", "--steps", "1", "--method", "embedding")
    with safe_open(word.final / "two.safetensors", "pt") as file:
        assert list(file.keys()) == ["<two>"]
    assert word.read()["identifier"] == "<two>"
    assert word.read()["config"]["prior"] == "none"


def test_an_embedding_is_in_the_place_of_the_identifier(training, modules):
    training.train("two", "--steps", "1", "--method", "embedding")
    (token,) = modules[0].trainee.family.tokenizers[0].encode("<two>", add_special_tokens=False)
    rows = [row[0] for row in modules[0].trainee._rows]
    assert [token in row.flatten().tolist() for row in rows] == [True, True, True, False, False]
