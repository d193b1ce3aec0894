"""One command's work on a run: from its manifest to the finished model, or to where it stops."""

from __future__ import annotations

import contextlib
import logging
import platform
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from dbcap import __version__, runs
from dbcap.config.models import CommonConfig
from dbcap.config.paths import cache_dir
from dbcap.config.training import TrainConfig
from dbcap.dataset import class_images
from dbcap.dataset.class_images import ClassImage
from dbcap.dataset.manifest import DataSet
from dbcap.dataset.words import Words
from dbcap.errors import DbcapError, UsageError
from dbcap.events import Events
from dbcap.models import cpu, device, families, hub
from dbcap.models.device import Choice
from dbcap.models.families.sd import StableDiffusion
from dbcap.models.hub import LocalModel
from dbcap.models.identity import Identity
from dbcap.models.mapped import trim
from dbcap.models.memory import memory_errors
from dbcap.models.trained import pinned
from dbcap.training import checkpoint, final, material, preflight, samples, settled, trainee
from dbcap.training.data import Data, Drawing
from dbcap.training.ema import Average
from dbcap.training.material import Material
from dbcap.training.metrics import Board, Table
from dbcap.training.module import DreamBooth, Objective, Rates
from dbcap.training.optimizer import DivergedError, maker
from dbcap.training.signals import Signals, StoppedError
from dbcap.training.steps import Every, Steps, exploded
from dbcap.training.validation import Validation

LARGE = 100_000_000
"""Parameters from which `--gradient-checkpointing auto` saves memory."""
_FIXED_HOST = ("cpu_class", "device", "precision")
"""Facts of the machine without which a run does not go on to the same bits."""
_DEFAULT_MODEL = TrainConfig.model_fields["model"].default


@dataclass(frozen=True)
class Ready:
    """What is known of a run before anything of its model is in memory."""

    local: LocalModel
    choice: Choice
    data: DataSet
    classes: tuple[ClassImage, ...]


class Session:
    """A run and how it is worked on."""

    def __init__(
        self,
        run: runs.Run,
        config: TrainConfig,
        common: CommonConfig,
        events: Events,
        *,
        deadline: float | None,
        allow_inexact: bool = False,
    ) -> None:
        self.run, self.config, self._common, self._events = run, config, common, events
        self._deadline, self._allow_inexact = deadline, allow_inexact
        self._signals = Signals()
        self._word = ""
        """What stands for the subject."""

    def go(self, start: Path | None) -> None:
        """Train from a checkpoint, or from the beginning, to the end; write the result.

        Raises StoppedError where it ends before; where it had begun, a checkpoint is written.
        """
        checkpoint.tidy(self.run)
        with self._signals.noting():
            ready = self.prepare()
            step = int(start.name) if start else 0
            with memory_errors(f"training {ready.local.spec.text}", "try --method lora, or --batch-size 1"):
                module, held = self._module(ready)
                self._fit(module, held, ready, start, step)
                self._finish(module, ready)

    # ---- what there is before the model is loaded

    def prepare(self) -> Ready:
        """Find the model, prepare photos and class images, and note all of it in the manifest.

        Raises UsageError where a run that goes on finds something else than when it began.
        """
        data = material.data_set(self.run, self.config, self._common, self._events)
        before = self.run.read()
        self._word = before.get("identifier") or self._new_word(data)
        local, base = self._locate(data, before.get("base"))
        if before.get("base") and before["base"]["revision"] != local.revision:
            raise UsageError(
                f"{local.spec.text} is not what the run {self.run.name} began with", "put it back, or begin a new run"
            )
        choice = self._choose(local, before.get("host") or {})
        classes: tuple[ClassImage, ...] = ()
        if self.config.prior != "none":
            left = None if self._deadline is None else self._deadline - time.monotonic()
            try:
                classes = class_images.ensure(data, local, choice.device, self._common, self._events, left)
            except class_images.TimeOverError:
                raise StoppedError(None) from None
        facts = material.facts(data, classes)
        if before.get("data"):
            material.check(before["data"], facts, self.run)
        self.run.update(
            identifier=self._identity(data).identifier,
            **{"class": data.class_word},
            base={"model": families.describe(local).address, "base": base, "revision": local.revision},
            data=facts,
            host=before.get("host") or self._host(choice),
            changed=runs.now(),
        )
        return Ready(local, choice, data, classes)

    def _new_word(self, data: DataSet) -> str:
        """Return what stands for the subject in this run, for good: one that branches off it keeps the word."""
        if self.config.method != "embedding":
            return data.identifier
        if not data.class_word:
            raise UsageError(
                "--method embedding needs a class word to begin with", "prepare with --class-word, as in dog"
            )
        return f"<{self.run.name}>"

    def _locate(self, data: DataSet, before: Mapping[str, Any] | None) -> tuple[LocalModel, str | None]:
        """Return the model that the run began with or was asked for, else that of the data set; and its base.

        Raises UsageError for one that is a LoRA or a new word beside another model, or that fills in pictures.
        """
        if before:
            model, base = pinned(before["model"], before["revision"]), before["base"]
        elif self.config.model != _DEFAULT_MODEL:
            model, base = self.config.model, self.config.base
        else:
            model, base = data.model, data.base
        if before and Path(model).is_absolute() and not Path(model).exists():
            raise UsageError(f"the run {self.run.name} began with {model}, which is not there any more", "put it back")
        local = hub.locate(
            model,
            kind="diffusion",
            base=base,
            offline=self._common.offline,
            allow_pickle=self._common.allow_pickle,
            events=self._events,
            home=cache_dir(),
        )
        if local.onnx:
            raise UsageError(f"{model} has ONNX files only", "train on the model that they were made of")
        if local.additions:
            raise UsageError(f"{model} is no whole model, but something beside one", "train on the model itself")
        if families.describe(local).inpaints:
            raise UsageError(f"{model} fills in parts of pictures, and is not trained", "choose another --model")
        return local, base

    def _choose(self, local: LocalModel, host: Mapping[str, Any]) -> Choice:
        if self.config.precision == "16" and device.choose(device=self.config.device, parameters=1).device == "cpu":
            raise UsageError("--precision 16 does not work on a CPU", "use bf16 or 32")
        choice = device.choose(
            device=self.config.device,
            dtype=settled.DTYPES[self.config.precision],
            batch_size=1,
            parameters=local.parameters,
            threads=host.get("threads"),
        )
        now = self._host(choice)
        for name in _FIXED_HOST:
            if host and host[name] != now[name] and not self._allow_inexact:
                raise UsageError(
                    f"the run {self.run.name} began with the {name.replace('_', ' ')} {host[name]}, and here is"
                    f" {now[name]}: it would not go on to the same bits",
                    "--allow-inexact goes on all the same",
                )
        for reason in (*choice.why[:2], choice.why[3]):
            self._events.detail(reason)
        torch.set_num_threads(choice.threads)
        return choice

    @staticmethod
    def _host(choice: Choice) -> dict[str, Any]:
        return {
            "cpu": cpu.cpu_name(),
            "cpu_class": choice.cpu_class,
            "device": choice.device.partition(":")[0],
            "precision": choice.dtype,
            "threads": choice.threads,
            "system": platform.platform(),
            "versions": {"dbcap": __version__, "torch": torch.__version__, "lightning": version("lightning")},
        }

    def _identity(self, data: DataSet) -> Identity:
        return Identity(self._word, data.class_word)

    # ---- the model

    def _module(self, ready: Ready) -> tuple[DreamBooth, Material]:
        """Load what is trained, and encode what it is shown."""
        config, data, local = self.config, ready.data, ready.local
        prompts = self._prompts(data)
        shown = material.gather(
            data, ready.classes, [*prompts.values(), ""], local, config, ready.choice.device, self._events
        )
        if config.method == "embedding":
            shown = replace(shown, captions=tuple(self._own(text, data) for text in shown.captions))
        working = "bfloat16" if ready.choice.dtype == "bfloat16" else "float32"
        family = families.load(local, ready.choice.device, working)
        self._warn_of_long(family, shown.captions)
        how = trainee.How(
            trains_text=config.train_text_encoder,
            keeps_base=config.prior == "prediction" and bool(shown.classes),
            accumulates=config.accumulate > 1,
            dtype=family.dtype,
            checkpoints=self._checkpoints(local),
        )
        trained = trainee.make(family, shown.captions, data.size, how, config, self._identity(data))
        trim()
        average = Average(trained.weights.masters, config.ema_decay) if config.ema else None
        rates = Rates(config.lr or 0.0, config.clip, settled.factor(config))
        module = DreamBooth(
            trained,
            objective(family, config),
            rates,
            maker(config.optimizer, config.weight_decay),
            config.seed,
            average,
        )
        return module, shown

    def _checkpoints(self, local: LocalModel) -> bool:
        asked = self.config.gradient_checkpointing
        return local.parameters >= LARGE if asked == "auto" else asked == "on"

    def _prompts(self, data: DataSet) -> dict[str, str]:
        """Return the prompts of sample pictures."""
        fill = Words(data.identifier, data.class_word).fill
        found = {"instance": fill(self.config.template)}
        if data.class_word:
            prompt = data.classes.prompts[0] if data.classes and data.classes.prompts else "a photo of a {class}"
            found["class"] = fill(prompt)
        return found

    def _warn_of_long(self, family: StableDiffusion, captions: tuple[str, ...]) -> None:
        for text in captions:
            if len(family.tokens(text)) > family.room:
                self._events.warn(f"a caption has more than {family.room} tokens, and its end is not read: {text[:60]}")

    # ---- training

    def _fit(self, module: DreamBooth, shown: Material, ready: Ready, start: Path | None, step: int) -> None:
        config, run = self.config, self.run
        schedule = len(module.objective.alphas)
        drawing = Drawing(config.seed, config.batch_size, schedule, config.offset_noise)
        data = Data(shown.photos, shown.classes, drawing, accumulate=config.accumulate, workers=config.workers)
        preflight.check(module, data, config, run, step, self._events)
        table = Table(run.metrics, step)
        total = config.steps or 0
        with (
            contextlib.closing(table),
            self._events.track("Training", total, "steps") as tracker,
            self._signals.listening(),
        ):
            tracker.advance(step)
            steps = Steps(
                run,
                Every(config.checkpoint_every, config.validate_every, config.sample_every, config.keep),
                self._events,
                tracker,
                table,
                Validation(shown.held_out, shown.classes, schedule, 2 * config.batch_size),
                partial(self._show, module, shown, ready),
                self._signals,
                self._deadline,
            )
            with _quiet():
                trainer = self._trainer(ready.choice, [table, *self._loggers(step)], steps, module)
                try:
                    trainer.fit(module, datamodule=data, ckpt_path=str(start) if start else None)
                except DivergedError as error:
                    raise exploded(trainer.global_step + 1, run, error.message) from error

    def _trainer(self, choice: Choice, loggers: list[Any], steps: Steps, module: DreamBooth) -> pl.Trainer:
        kind, _, index = choice.device.partition(":")
        return pl.Trainer(
            accelerator={"cuda": "gpu"}.get(kind, kind),
            devices=[int(index)] if index else 1,
            precision="16-mixed" if choice.dtype == "float16" else "32-true",
            max_steps=self.config.steps or 0,
            max_epochs=-1,
            accumulate_grad_batches=self.config.accumulate,
            logger=loggers,
            callbacks=[steps],
            plugins=[checkpoint.Folders(module.trainee.headers), LightningEnvironment()],  # whatever cluster it is in
            default_root_dir=self.run.folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )

    def _loggers(self, step: int) -> list[Any]:
        """Return TensorBoard's, and the tracker's."""
        board = Board(self.run.folder, step)
        if self.config.tracker == "none":
            return [board]
        from lightning.pytorch.loggers import WandbLogger

        try:
            return [board, WandbLogger(name=self.run.name, id=self.run.name, save_dir=self.run.folder, project="dbcap")]
        except ModuleNotFoundError:
            raise DbcapError("--tracker wandb needs wandb", "run `pip install 'dbcap[wandb]'`") from None

    def _show(self, module: DreamBooth, shown: Material, ready: Ready, step: int) -> None:
        """Make sample pictures of a step."""
        family = module.trainee.family
        prompts = {kind: self._own(text, ready.data) for kind, text in self._prompts(ready.data).items()}
        wanted = samples.Wanted(
            {kind: shown.captions.index(text) for kind, text in prompts.items()},
            shown.captions.index(""),
            ready.data.size,
            self.config.sample_guidance,
        )
        decoder = families.load(ready.local, str(family.device), "float32")
        samples.make(module.trainee, decoder, wanted, checkpoint.place_of(self.run.samples, step))

    def _own(self, text: str, data: DataSet) -> str:
        """Return a caption as this run has it."""
        return Words(data.identifier, data.class_word).renamed(text, str(self._identity(data).identifier))

    # ---- the result

    def _finish(self, module: DreamBooth, ready: Ready) -> None:
        """Write the model, its moving average where there is one."""
        state = module.average.state() if module.average else module.state_dict()
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in state.items():
            part, _, own = name.partition(".")
            parts.setdefault(part, {})[own] = tensor
        identity, folder, family = self._identity(ready.data), self.run.final, module.trainee.family
        said = self.run.read() | {"status": runs.FINISHED, "step": self.config.steps}
        if self.config.method == "full":
            final.write_full(ready.local, family, parts, folder, identity, final.card(said))
            return
        header = module.trainee.headers.get(trainee.ADAPTER, {})
        path = folder / final.adapter_file(identity)
        final.write_adapter(path, parts[trainee.ADAPTER], header, identity, said["base"], final.card(said))


def objective(family: StableDiffusion, config: TrainConfig) -> Objective:
    """Return what a run minimises, by the model's own noise schedule."""
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler.from_config(dict(family.scheduler_config))
    return Objective(
        schedule.alphas_cumprod,
        str(schedule.config.prediction_type),
        config.prior_weight,
        config.prior == "prediction",
        config.min_snr,
    )


class _quiet(warnings.catch_warnings):  # noqa: N801 - used as a function
    """Keep Lightning's advice off the terminal, and what TensorBoard's thread says of errors that it also raises."""

    def __enter__(self) -> Any:
        found = super().__enter__()
        warnings.simplefilter("ignore")
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self._hook = threading.excepthook
        threading.excepthook = lambda args: None if issubclass(args.exc_type, OSError) else self._hook(args)
        return found

    def __exit__(self, *exc: Any) -> None:
        threading.excepthook = self._hook
        super().__exit__(*exc)
