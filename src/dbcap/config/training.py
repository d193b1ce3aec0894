"""The settings of `dbcap prep`, `dbcap train` and `dbcap resume`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import model_validator

from dbcap.config.base import COMPUTE, MOST, OUTPUT, Count, DeviceConfig, Place, Seed, Side, Text, time_limit
from dbcap.config.fields import Section, argument, option

PHOTOS = "Photos"
WORDS = "Words and captions"
PRIOR = "Class images"
METHOD = "What is trained"
TRAINING = "Training"
LOSS = "Loss"
RUN = "Run"
FULL_STEPS, EMBEDDING_STEPS = 800, 3000
LEARNING_RATES = {"full": 2e-6, "lora": 1e-4, "embedding": 5e-4}
Every = Annotated[int, Ge(0)]
_STOP, _TO_THE_END = "Write a checkpoint and stop after TIME.", "until all steps are done"


def _name(help_: str, unset: str) -> Any:
    return option(
        None,
        help_,
        group=RUN,
        metavar="NAME",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        takes="letters, digits, dot, dash and underscore, at most 64",
        unset=unset,
    )


class PreparingConfig(DeviceConfig):
    """How photos become a data set; `dbcap train` takes the same options for a folder of raw photos."""

    model: Text = option(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "Diffusion model to train: starter, org/name[@revision] on the hub, a folder, or a .safetensors file.",
        "-m",
        group=COMPUTE,
        metavar="MODEL",
    )
    base: Place | None = option(
        None,
        "Take configs and tokenizers of a one-file --model from this folder.",
        group=COMPUTE,
        metavar="FOLDER",
        unset="from the file's header, or the hub's cache",
    )
    size: Side | None = option(None, "Width and height in pixels.", group=PHOTOS, unset="the model's own")
    crop: Literal["center", "smart", "pad", "none"] = option(
        "center",
        "Make photos square by cutting around the center or around what has most detail, by adding a blurred border, or"
        " not at all: then training cuts at several places.",
        group=PHOTOS,
    )
    drop_duplicates: bool = option(False, "Leave out near-duplicates, mirrored ones too.", group=PHOTOS)
    max_pixels: Count = option(178_956_970, "Refuse larger images.", group=PHOTOS)

    class_word: Text | None = option(
        None, "What kind of thing the subject is, as in dog.", group=WORDS, metavar="WORD", unset="no prior"
    )
    identifier: Text = option(
        "auto", "The word that will mean the subject; auto picks a rare one.", group=WORDS, metavar="WORD"
    )
    template: Text = option(
        "a photo of [V] {class}",
        "Caption of photos that have none; [V] stands for the identifier.",
        group=WORDS,
        metavar="TEXT",
    )
    caption: bool = option(False, "Have a captioner describe photos that have no caption.", group=WORDS)
    captioner: Text = option(
        "nlpconnect/vit-gpt2-image-captioning",
        "With --caption: starter, org/name[@revision] on the hub, or a folder.",
        group=WORDS,
        metavar="MODEL",
    )

    class_images: Annotated[int, Ge(0), Le(100_000)] = option(
        100, "Images of the class that the model makes itself, so that it does not forget it.", group=PRIOR
    )
    class_prompts: tuple[str, ...] = option(
        ("a photo of a {class}",),
        "Prompt of class images, or a file with one a line (a value without spaces); may be repeated.",
        group=PRIOR,
        metavar="PROMPT|FILE",
    )
    class_guidance: float = option(
        1.0, "Guidance of class images; 1 draws what the model knows, above 1 spoils the prior.", group=PRIOR, ge=0
    )
    class_steps: Annotated[int, Ge(1), Le(1000)] = option(30, "Steps of the sampler for class images.", group=PRIOR)
    class_dir: Place | None = option(
        None, "Use your own photos of the class instead.", group=PRIOR, metavar="FOLDER", unset="made by the model"
    )


class PrepConfig(PreparingConfig):
    """`dbcap prep`."""

    photos: tuple[str, ...] = argument("PHOTO", "Photos of the subject, and folders of them.")
    out: Place | None = option(None, "Folder of the data set.", "-o", group=OUTPUT, metavar="DATASET", unset="required")

    @model_validator(mode="after")
    def _needs(self) -> PrepConfig:
        if not self.out:
            raise ValueError("--out is missing: name the folder of the data set")
        return self


class TrainConfig(PreparingConfig):
    """`dbcap train`."""

    data: tuple[str, ...] = argument("DATASET", "A data set of `dbcap prep`, or photos and folders of them.")

    name: str | None = _name("Name of the run.", "the data set's, with a number")
    method: Literal["full", "lora", "embedding"] = option(
        "full", "Train the whole denoiser and text encoder, a LoRA, or a new word only.", group=METHOD
    )
    train_text_encoder: bool = option(True, "Train the text encoder as well.", group=METHOD)
    rank: Annotated[int, Ge(1), Le(1024)] = option(8, "LoRA: rank of the matrices.", group=METHOD)
    alpha: float | None = option(None, "LoRA: scale times rank.", group=METHOD, gt=0, le=4096, unset="the rank")
    targets: Literal["attention", "all"] = option(
        "attention", "LoRA: layers of the denoiser that get one: attention's, or all linear and convolutions.",
        group=METHOD,
    )  # fmt: skip

    steps: Count | None = option(
        None, "Steps of training.", group=TRAINING, unset=f"{FULL_STEPS}, of an embedding {EMBEDDING_STEPS}"
    )
    lr: float | None = option(
        None, "Learning rate.", group=TRAINING, gt=0, le=1, unset="full 2e-6, lora 1e-4, embedding 5e-4"
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = option(
        "constant", "What the learning rate does after the warm-up.", group=TRAINING
    )
    warmup: Every = option(0, "Steps in which the learning rate rises from nothing.", group=TRAINING)
    batch_size: Annotated[int, Ge(1), Le(MOST)] = option(
        1, "Photos that go through the model at once, beside as many class images.", group=TRAINING
    )
    accumulate: Annotated[int, Ge(1), Le(1024)] = option(1, "Batches of one step.", group=TRAINING)
    seed: Seed = option(0, "Seed of all that is drawn.", group=TRAINING)
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = option("adamw", "Optimizer.", group=TRAINING)
    weight_decay: float = option(1e-2, "Decay of the weights.", group=TRAINING, ge=0, le=1)
    clip: float = option(1.0, "Longest gradient, its norm over all weights; 0 leaves it.", group=TRAINING, ge=0)
    ema: bool = option(False, "Keep a moving average of the weights, and make it the result.", group=TRAINING)
    ema_decay: float = option(0.999, "How slowly the average moves.", group=TRAINING, ge=0, lt=1)
    flip: bool = option(False, "Show photos mirrored as well.", group=TRAINING)
    precision: Literal["auto", "32", "bf16", "16"] = option(
        "auto", "Numbers of the forward and backward pass; the weights are kept in 32 bits.", group=TRAINING
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = option(
        "auto", "Compute parts of the forward pass twice, to save memory: auto does it for large models.",
        group=TRAINING,
    )  # fmt: skip
    workers: Annotated[int, Ge(0), Le(MOST)] = option(
        0, "Processes that draw noise beside the model.", group=TRAINING, changeable=True
    )

    prior: Literal["images", "prediction", "none"] = option(
        "images",
        "Keep the class by the noise of class images (the paper), by what the base model predicts of them, or not.",
        group=LOSS,
    )
    prior_weight: float = option(1.0, "How much the class counts beside the photos.", group=LOSS, ge=0, le=1000)
    min_snr: float | None = option(
        None, "Weigh steps of little noise down to this ratio (5 is usual).", group=LOSS, gt=0, unset="all count alike"
    )
    offset_noise: float = option(
        0.0, "Noise that is the same all over a picture, for dark and bright ones (0.05 is usual).",
        group=LOSS, ge=0, le=1,
    )  # fmt: skip

    checkpoint_every: Every = option(
        200, "Steps between checkpoints; 0 makes one at the end only.", group=RUN, changeable=True
    )
    keep: Count = option(2, "Newest checkpoints that are kept, beside the best.", group=RUN, changeable=True)
    validate_every: Every = option(100, "Steps between validations; 0 is never.", group=RUN, changeable=True)
    sample_every: Every = option(200, "Steps between sample images; 0 is never.", group=RUN, changeable=True)
    sample_guidance: float = option(7.5, "Guidance of sample images.", group=RUN, ge=0, changeable=True)
    tracker: Literal["none", "wandb"] = option(
        "none", "Send the metrics there as well, beside TensorBoard's and CSV's files.", group=RUN, changeable=True
    )
    max_time: str | None = time_limit(_STOP, _TO_THE_END, group=RUN, changeable=True)

    @model_validator(mode="after")
    def _combinations(self) -> TrainConfig:
        if self.method == "embedding" and not self.train_text_encoder:
            raise ValueError("--no-train-text-encoder: an embedding is the text encoder's")
        return self


class ResumeConfig(Section):
    """`dbcap resume`."""

    runs: tuple[str, ...] = argument("RUN", "Name of the run; without it the last unfinished one.", required=False)
    steps: Count | None = option(
        None,
        "Train up to this step, further than the run was to go.",
        group=TRAINING,
        unset="as many as were asked for",
    )
    max_time: str | None = time_limit(_STOP, _TO_THE_END, group=RUN)
    allow_inexact: bool = option(
        False,
        "Go on where the result will not be equal to the bit: on another CPU or device, in other numbers.",
        group=RUN,
    )
    from_: str | None = option(
        None,
        "Begin a new run from this checkpoint; needs --name.",
        group=RUN,
        metavar="STEP|best|last",
        pattern=r"^(best|last|[0-9]{1,9})$",
        takes="a step, best or last",
        unset="go on from the last checkpoint",
    )
    name: str | None = _name("With --from: name of the new run.", "none")

    @model_validator(mode="after")
    def _combinations(self) -> ResumeConfig:
        if len(self.runs) > 1:
            raise ValueError("resume goes on with one run at a time")
        if (self.from_ is None) != (self.name is None):
            raise ValueError("--from and --name go together: a checkpoint, and the new run that begins there")
        return self
