"""The settings of `dbcap export`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from dbcap.config.base import OUTPUT, Place
from dbcap.config.fields import Section, argument, flag_of, option

FORMATS = "Formats"
PROOF = "Proof"
PRECISIONS = ("fp16", "int8", "int4")
ALONE = ("torch_bnb4", "torch_bnb8")
"""Formats that are a folder of their own."""


class ExportConfig(Section):
    """`dbcap export`."""

    models: tuple[str, ...] = argument(
        "MODEL",
        "Captioner or diffusion model: starter, run:NAME[@STEP], org/name on the hub, a folder or a .safetensors file;"
        " the captioner of the settings if none is given.",
        required=False,
    )
    onnx: bool = option(False, "Write ONNX graphs in float32.", group=FORMATS)
    fp16: bool = option(False, "Write ONNX graphs in float16; with --single-file its number format.", group=FORMATS)
    int8: bool = option(False, "Write ONNX graphs with weights in 8 bits.", group=FORMATS)
    int4: bool = option(False, "Write ONNX graphs with weights in 4 bits.", group=FORMATS)
    fp32: bool = option(True, "Write float32 beside the other precisions.", group=FORMATS)
    layout: Literal["transformers.js", "optimum"] = option(
        "transformers.js",
        "Names of the ONNX files: all variants in onnx/, or one variant under the names that Optimum finds.",
        group=FORMATS,
    )

    out: Place | None = option(
        None, "Folder or file to write.", "-o", group=OUTPUT, metavar="PATH", unset="NAME-export here"
    )
    force: bool = option(False, "Replace an earlier export.", group=OUTPUT)

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
    def variants(self) -> tuple[str, ...]:
        """The ONNX variants that are asked for, by the names of `models.exported`."""
        asked = [name for name in PRECISIONS if getattr(self, name)]
        names = {"fp16": "fp16", "int8": "int8", "int4": "q4"}
        plain = ("fp32",) if (self.onnx or asked) and self.fp32 else ()
        return (*plain, *(names[name] for name in asked))

    @model_validator(mode="after")
    def _combinations(self) -> ExportConfig:
        if len(self.models) > 1:
            raise ValueError("export takes one model at a time")
        if not (self.onnx or any(getattr(self, name) for name in PRECISIONS)):
            raise ValueError("nothing is asked for: add --onnx, --fp16, --int8 or --int4")
        if not self.variants:
            raise ValueError("--no-fp32 leaves nothing: add --fp16, --int8 or --int4")
        if self.layout == "optimum" and len(self.variants) > 1:
            raise ValueError("--layout optimum takes one variant: add --no-fp32 beside one precision")
        if self.calibrate and not self.int8:
            raise ValueError("--calibrate needs --int8")
        for name in ("check_images", "max_drop"):
            if getattr(self, name) is not None and not self.check:
                raise ValueError(f"{flag_of(name)} needs a check, and --no-check leaves it out")
        return self
