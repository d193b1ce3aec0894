"""The settings of every command. Option, environment variable, TOML key and docs are derived from these fields."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import model_validator

from dbcap.config.base import (
    COMMON,
    COMPUTE,
    MOST,
    OF_MODEL,
    OUTPUT,
    READING,
    CommonConfig,
    ComputeConfig,
    Count,
    Place,
    Seed,
    Side,
    Text,
    time_limit,
)
from dbcap.config.exporting import ExportConfig
from dbcap.config.fields import Section, argument, flag_of, option
from dbcap.config.training import PrepConfig, ResumeConfig, TrainConfig

__all__ = [
    "COMMON",
    "SCHEDULERS",
    "SECTIONS",
    "CaptionConfig",
    "CommonConfig",
    "ExportConfig",
    "GenerateConfig",
    "PrepConfig",
    "ResumeConfig",
    "TrainConfig",
]

DECODING = "Decoding"
PROMPTS = "Prompts"
SAMPLING = "Sampling"
OF_BEAMS = ("length_penalty", "early_stopping")
SCHEDULERS = ("ddim", "pndm", "euler", "euler-a", "dpm++", "dpm++-karras", "unipc", "lms", "heun")


class CaptionConfig(ComputeConfig):
    """`dbcap caption`."""

    inputs: tuple[str, ...] = argument(
        "INPUT", "Images, folders, globs, http(s) URLs, @LIST for a file that lists them, - for a list on stdin."
    )
    recursive: bool = option(False, "Go into the folders of folders.", "-r", group=READING)
    null: bool = option(False, "Lists are separated by NUL instead of newline.", "-0", group=READING)
    alpha: str = option(
        "white",
        "Colour behind transparent pixels: white, black or #rrggbb.",
        group=READING,
        metavar="COLOUR",
        pattern=r"^(?i:white|black|#[0-9a-f]{6})$",
        takes="white, black or #rrggbb",
    )
    max_pixels: Count = option(178_956_970, "Refuse larger images.", group=READING)
    url_timeout: float = option(30.0, "Seconds that fetching a URL may take.", group=READING, gt=0)
    url_max_mb: Count = option(64, "Megabytes that a URL may hold.", group=READING)
    workers: int = option(
        2, "Threads that read and prepare images beside the model; 0 does it in turn.", group=READING, ge=0, le=MOST
    )

    model: Text = option(
        "nlpconnect/vit-gpt2-image-captioning",
        "Captioner: starter, org/name[@revision] on the hub, or a folder; of an exported one also FOLDER:VARIANT.",
        "-m",
        group=COMPUTE,
        metavar="MODEL",
    )
    engine: Literal["auto", "torch", "onnx"] = option(
        "auto",
        "What runs the model: torch, onnx (an exported model on the CPU), or what its files are for.",
        group=COMPUTE,
    )
    prompt: str | None = option(None, "Text that the caption begins with (BLIP and GIT).", group=COMPUTE)

    num_beams: int | None = option(
        None, "Beams of the search; 1 is greedy.", ge=1, le=MOST, group=DECODING, unset=f"{OF_MODEL}, else 1"
    )
    max_length: Count | None = option(
        None, "Most tokens of a caption, the start token included.", group=DECODING, unset=f"{OF_MODEL}, else 16"
    )
    min_length: int | None = option(None, "Fewest tokens of a caption.", group=DECODING, ge=0, unset=OF_MODEL)
    length_penalty: float | None = option(
        None, "Beams: above 0 favours longer captions.", ge=-100, le=100, group=DECODING, unset=OF_MODEL
    )
    early_stopping: Literal["yes", "no", "never"] | None = option(
        None,
        "Beams: end as soon as that many have ended (yes), when a better one is unlikely (no), or impossible (never).",
        group=DECODING,
        unset=f"{OF_MODEL}, else no",
    )
    no_repeat_ngram_size: int | None = option(
        None, "No run of this many tokens stands twice; 0 allows it.", group=DECODING, ge=0, unset=OF_MODEL
    )
    repetition_penalty: float | None = option(
        None, "Above 1 makes tokens that stand already less likely.", group=DECODING, ge=0.01, le=100, unset=OF_MODEL
    )
    sample: bool = option(False, "Draw captions instead of searching for the best.", group=DECODING)
    top_p: float | None = option(
        None, "Sampling: smallest set of tokens with this probability.", group=DECODING, gt=0, le=1, unset=OF_MODEL
    )
    top_k: int | None = option(
        None, "Sampling: this many most likely tokens; 0 means all.", group=DECODING, ge=0, unset=OF_MODEL
    )
    temperature: float | None = option(
        None, "Sampling: above 1 is more random.", group=DECODING, ge=0.01, le=100, unset=OF_MODEL
    )
    num_captions: int = option(1, "Candidates for each image, best first.", ge=1, le=MOST, group=DECODING)
    seed: int = option(
        0, "Seed of sampling; each image draws by (seed, its content).", group=DECODING, ge=0, le=2**64 - 1
    )

    format: Text = option(
        "text",
        "text, tsv, csv, json, jsonl (to stdout or -o), sidecar, metadata, xmp (beside the images), or a plugin's.",
        "-f",
        group=OUTPUT,
        metavar="FORMAT",
    )
    output: str | None = option(
        None, "Write to this file; - is stdout.", "-o", group=OUTPUT, metavar="FILE", unset="stdout"
    )
    with_filename: bool | None = option(
        None,
        "Text: print the path before each caption, or never.",
        "--with-filename/--no-filename",
        "-H/-h",
        group=OUTPUT,
        unset="with it, unless the input is one file or URL",
    )
    extension: str = option(".txt", "Ending of sidecar files.", group=OUTPUT, metavar=".EXT")
    prefix: str = option("", "Put this before each caption.", group=OUTPUT)
    suffix: str = option("", "Put this after each caption.", group=OUTPUT)
    template: str = option(
        "{caption}",
        "Frame of each caption; {caption} and {stem} (of the file name) stand for themselves.",
        group=OUTPUT,
    )
    replace: tuple[str, ...] = option(
        (), "Replace words of the caption; may be repeated.", group=OUTPUT, metavar="OLD=NEW"
    )
    resume: bool = option(False, "Go on with an interrupted -o FILE.", group=OUTPUT)
    force: bool = option(False, "Replace an existing -o FILE.", group=OUTPUT)
    lock: str | None = option(None, "Lock this file instead of the one beside -o FILE.", group=OUTPUT, metavar="FILE")
    existing: Literal["skip", "overwrite", "append", "prepend", "error"] = option(
        "skip", "What to do with captions that stand beside an image already.", group=OUTPUT
    )
    errors: str | None = option(None, "Write failed inputs to this file, as JSON lines.", group=OUTPUT, metavar="FILE")
    on_error: Literal["skip", "stop"] = option(
        "skip", "Go on after a failed input, or stop at the first.", group=OUTPUT
    )

    @model_validator(mode="after")
    def _combinations(self) -> CaptionConfig:
        if not self.sample:
            for name in ("top_p", "top_k", "temperature"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name.replace('_', '-')} needs --sample")
        elif (self.num_beams or 1) > 1:
            raise ValueError("--sample and --num-beams exclude each other")
        elif of_beams := [name for name in OF_BEAMS if getattr(self, name) is not None]:
            raise ValueError(f"{flag_of(of_beams[0])} needs beams, and --sample has none")
        if self.min_length and self.max_length and self.min_length > self.max_length:
            raise ValueError(f"--min-length {self.min_length} is above --max-length {self.max_length}")
        if "{caption}" not in self.template:
            raise ValueError("--template has no {caption}")
        if bad := [text for text in self.replace if "=" not in text or text.startswith("=")]:
            raise ValueError(f"--replace {bad[0]!r} is not of the form OLD=NEW")
        return self

    @model_validator(mode="after")
    def _places(self) -> CaptionConfig:
        placed = self.format in ("sidecar", "xmp")
        if self.output and placed:
            raise ValueError(f"--format {self.format} writes beside the images: it takes no -o")
        if self.resume and self.output in (None, "-"):
            raise ValueError("--resume needs -o FILE")
        if self.resume and self.force:
            raise ValueError("--resume and --force exclude each other")
        if not self.extension.startswith(".") or "/" in self.extension or len(self.extension) < 2:
            raise ValueError(f"--extension {self.extension!r} must begin with a dot, as in .txt")
        return self


class GenerateConfig(ComputeConfig):
    """`dbcap generate`."""

    prompts: tuple[str, ...] = argument(
        "PROMPT", "Prompts, @FILE for a list of them (lines, .jsonl or .csv), - for a list on stdin.", required=False
    )
    like: Place | None = option(
        None, "Make the image in this file of dbcap's again, from what is written in it.", group=PROMPTS, metavar="FILE"
    )
    expand: bool = option(
        False, "Make all combinations of alternatives: words in braces, with bars between.", group=PROMPTS
    )
    negative: str = option("", "What the image shall not show.", group=PROMPTS)
    long_prompt: Literal["truncate", "chunk", "error"] = option(
        "truncate", "What to do with a prompt of more tokens than the model reads.", group=PROMPTS
    )

    model: Text = option(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "Diffusion model: starter, run:NAME[@STEP], org/name[@revision] on the hub, a folder, or a .safetensors file.",
        "-m",
        group=COMPUTE,
        metavar="MODEL",
    )
    engine: Literal["auto", "torch", "onnx"] = option(
        "auto",
        "What runs the model: torch, onnx (an exported model on the CPU), or what its files are for.",
        group=COMPUTE,
    )
    base: Place | None = option(
        None,
        "Take configs and tokenizers of a one-file --model from this folder.",
        group=COMPUTE,
        metavar="FOLDER",
        unset="from the file's header, or the hub's cache",
    )
    lora: tuple[str, ...] = option(
        (),
        "Add a LoRA file to the model, with a scale (1 if none is given); may be repeated.",
        group=COMPUTE,
        metavar="FILE[:SCALE]",
    )
    embedding: tuple[str, ...] = option(
        (),
        "Teach the model the word of a textual inversion file; may be repeated.",
        group=COMPUTE,
        metavar="FILE",
    )
    low_memory: bool = option(False, "Decode in tiles: slower, in less memory.", group=COMPUTE)

    num_images: Count = option(1, "Images for each prompt.", "-n", group=SAMPLING)
    seed: Literal["random"] | Seed = option(
        0, "Seed of the first image of each prompt, the next ones counting up, or random.", group=SAMPLING
    )
    scheduler: str | None = option(
        None, f"Sampler: {', '.join(SCHEDULERS)}.", group=SAMPLING, metavar="NAME", unset=OF_MODEL
    )
    steps: Annotated[int, Ge(1), Le(1000)] = option(30, "Steps of the sampler.", group=SAMPLING)
    guidance: float = option(
        7.5, "How closely to follow the prompt; 1 or less is without guidance, twice as fast.", group=SAMPLING, ge=0
    )
    guidance_rescale: float = option(
        0.0, "Against pale or burnt images at high guidance (0.7 is usual).", group=SAMPLING, ge=0, le=1
    )
    eta: float = option(0.0, "DDIM: noise in each step, from 0 (none) to 1.", group=SAMPLING, ge=0, le=1)
    width: Side | None = option(None, "Width in pixels.", group=SAMPLING, unset=OF_MODEL)
    height: Side | None = option(None, "Height in pixels.", group=SAMPLING, unset=OF_MODEL)
    init: Place | None = option(None, "Begin with this image instead of noise.", group=SAMPLING, metavar="IMAGE")
    strength: float = option(
        0.8, "With --init: how much of it is painted over, from 0 to 1.", group=SAMPLING, ge=0, le=1
    )
    mask: Place | None = option(
        None, "With --init: paint only where this image is white.", group=SAMPLING, metavar="IMAGE"
    )

    out: Place = option("outputs", "Folder to write into.", "-o", group=OUTPUT, metavar="DIR")
    name: Text = option(
        "{index:05d}-{seed}",
        "File name without its ending; fields: index, seed, prompt, date, run, step.",
        group=OUTPUT,
        metavar="TEMPLATE",
    )
    image_format: Literal["png", "webp", "jpeg"] = option("png", "File format of the images.", group=OUTPUT)
    format: Literal["paths", "jsonl"] = option(
        "paths", "What to print for each image: its path, or all about it.", "-f", group=OUTPUT
    )
    show: bool = option(False, "Show each image in a terminal that can (iTerm2, WezTerm, kitty ...).", group=OUTPUT)
    grid: Place | None = option(None, "Write all images of this run side by side.", group=OUTPUT, metavar="FILE")
    existing: Literal["skip", "overwrite", "error"] = option(
        "skip", "What to do with images that are there already.", group=OUTPUT
    )
    lock: Place | None = option(None, "Lock this file instead of one in the folder.", group=OUTPUT, metavar="FILE")
    dry_run: bool = option(False, "Say what would be made, and make nothing.", group=OUTPUT)
    max_time: str | None = time_limit("Stop between images after TIME.", "until all are made", group=OUTPUT)
    safety: bool = option(False, "Fail images that the model's safety checker flags, if it has one.", group=OUTPUT)
    on_error: Literal["skip", "stop"] = option("skip", "Go on after an image that failed, or stop.", group=OUTPUT)

    @model_validator(mode="after")
    def _combinations(self) -> GenerateConfig:
        if self.mask and not (self.init or self.like):
            raise ValueError("--mask needs --init")
        if self.like and self.prompts:
            raise ValueError("--like takes the prompt from the image: give no other")
        if any("\ud800" <= letter <= "\udfff" for letter in self.negative):
            raise ValueError("--negative is no UTF-8")
        if not self.like and not self.prompts:
            raise ValueError('there is no prompt: write one, as in dbcap generate "a photo of a cat"')
        return self


SECTIONS: dict[str, type[Section]] = {
    "caption": CaptionConfig,
    "prep": PrepConfig,
    "train": TrainConfig,
    "resume": ResumeConfig,
    "generate": GenerateConfig,
    "export": ExportConfig,
}
"""Table of a file -> its model. A command that is added adds its line here."""
