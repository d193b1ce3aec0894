"""The settings of `dbcap export`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from dbcap.config.base import OUTPUT, Place
from dbcap.config.fields import Section, argument, flag_of, option

FORMATS = "Formats"
PROOF = "Proof"
PRECISIONS = ("fp16", "int8", "int4")
OTHERS = ("single_file", "lora", "diffusers", "torch_bnb4", "torch_bnb8")
"""Formats beside ONNX: an export has one."""
FILES = ("single_file", "lora")
"""Formats of one file."""
OF_CAPTIONERS = ("layout", "fp32", "check", "check_images", "max_drop", "calibrate")
"""Settings that only ONNX files of captioners have."""


class ExportConfig(Section):
    """`dbcap export`."""

    alternatives = ("onnx", *PRECISIONS, *OTHERS)

    models: tuple[str, ...] = argument(
        "MODEL",
        "Captioner or diffusion model: starter, run:NAME[@STEP], org/name on the hub, a folder or a .safetensors file,"
        " for --lora that of a LoRA; if none is given, the captioner of the settings.",
        required=False,
    )
    base: Place | None = option(
        None,
        "Take configs and tokenizers of a one-file MODEL from this folder.",
        group=FORMATS,
        metavar="FOLDER",
        unset="from the file's header, or the hub's cache",
    )
    onnx: bool = option(False, "Write ONNX graphs in float32.", group=FORMATS)
    fp16: bool = option(
        False, "Write ONNX graphs in float16; with --single-file its numbers, else as they are.", group=FORMATS
    )
    int8: bool = option(False, "Write ONNX graphs with weights in 8 bits.", group=FORMATS)
    int4: bool = option(False, "Write ONNX graphs of a captioner with weights in 4 bits (variant q4).", group=FORMATS)
    fp32: bool = option(
        True, "Write float32 beside the other precisions; diffusion models have one precision.", group=FORMATS
    )
    single_file: bool = option(
        False, "Write a diffusion model as one .safetensors file with the original names.", group=FORMATS
    )
    lora: Literal["kohya", "diffusers"] | None = option(
        None, "Write a LoRA with the names of one or the other.", group=FORMATS, unset="none"
    )
    diffusers: bool = option(False, "Write a diffusion model as a folder that diffusers loads.", group=FORMATS)
    torch_bnb4: bool = option(False, "Write a captioner with weights in 4 bits by bitsandbytes.", group=FORMATS)
    torch_bnb8: bool = option(False, "Write a captioner with weights in 8 bits by bitsandbytes.", group=FORMATS)
    layout: Literal["transformers.js", "optimum"] = option(
        "transformers.js",
        "Names of the ONNX files: all variants in onnx/, or one variant under the names that Optimum finds.",
        group=FORMATS,
    )

    out: Place | None = option(
        None,
        "Folder to write; of formats of one file X.safetensors, or the folder that gets NAME.safetensors.",
        "-o",
        group=OUTPUT,
        metavar="PATH",
        unset="NAME-export here",
    )
    force: bool = option(False, "Replace an earlier export, or an empty folder.", group=OUTPUT)

    check: bool = option(True, "Compare captions of each variant with those of float32.", group=PROOF)
    check_images: Place | None = option(
        None, "Images to compare captions of.", group=PROOF, metavar="DIR", unset="the starter's samples"
    )
    max_drop: float | None = option(
        None, "Fail where more than this share of captions differs from float32.", group=PROOF, ge=0, le=1, unset="warn"
    )
    calibrate: Place | None = option(
        None,
        "Measure the ranges of the encoder's numbers on these images, for --int8.",
        group=PROOF,
        metavar="DIR",
        unset="as numbers come",
    )

    @property
    def format(self) -> str:
        """What is asked for: "onnx", or the name of one of the other formats."""
        return next((name for name in OTHERS if getattr(self, name)), "onnx")

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that are asked for beside float32."""
        return tuple(name for name in PRECISIONS if getattr(self, name))

    @property
    def variants(self) -> tuple[str, ...]:
        """The ONNX variants of a captioner that are asked for, by the names of `models.exported`."""
        names = {"fp16": "fp16", "int8": "int8", "int4": "q4"}
        return (*(("fp32",) if self.fp32 else ()), *(names[name] for name in self.precisions))

    @model_validator(mode="after")
    def _combinations(self) -> ExportConfig:
        if len(self.models) > 1:
            raise ValueError("export takes one model at a time")
        others = [name for name in OTHERS if getattr(self, name)]
        if others:
            self._check_others(others)
        else:
            self._check_onnx()
        for name in ("check_images", "max_drop"):
            if getattr(self, name) is not None and not self.check:
                raise ValueError(f"{flag_of(name)} needs a check, and --no-check leaves it out")
        return self

    def _check_onnx(self) -> None:
        if not (self.onnx or self.precisions):
            raise ValueError(
                "nothing is asked for: add --onnx, --fp16, --int8 or --int4,"
                f" or one of {', '.join(flag_of(name) for name in OTHERS)}"
            )
        if not self.variants:
            raise ValueError("--no-fp32 leaves nothing: add --fp16, --int8 or --int4")

    def _check_others(self, others: list[str]) -> None:
        """Raise ValueError for what does not go with a format that is not ONNX."""
        first = flag_of(others[0])
        beside = [flag_of(name) for name in others[1:]] + (["--onnx"] if self.onnx else [])
        beside += [flag_of(name) for name in self.precisions if (others[0], name) != ("single_file", "fp16")]
        if beside:
            raise ValueError(f"{first} and {beside[0]} do not go together: export them one after the other")
