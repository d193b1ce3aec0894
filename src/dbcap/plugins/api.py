"""All that a plugin author imports. Nothing heavy is loaded by importing this.

A plugin is a distribution with an entry point in the group `dbcap.plugins` that names a `Plugin` (an object, a class
or a factory without arguments), in `dbcap.commands` that names a `typer.Typer`, or both; docs/plugins.md has one of
each. To test one, `dbcap.testing` holds the pytest fixtures that dbcap's own tests use: tiny real models, sample images
and an isolated home.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from dbcap.errors import ConfigError, DbcapError, InputError, ModelError, UsageError
from dbcap.events import Events

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

__all__ = [
    "API_VERSION",
    "Candidate",
    "Capabilities",
    "Captioner",
    "CaptionerFactory",
    "ConfigError",
    "DbcapError",
    "Events",
    "InputError",
    "Kind",
    "Model",
    "ModelError",
    "Plugin",
    "Record",
    "UsageError",
    "Writer",
    "WriterFactory",
]

API_VERSION = 1
"""Raised whenever a hook changes in a way that breaks existing plugins."""

Kind = Literal["captioner", "diffusion"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Model:
    """A model on disk that users then name by `--model NAME`. Raises ValueError for a name or kind that cannot be."""

    name: str
    """Letters, digits, `.`, `_`, `-`: slashes are for the hub and for folders. A name may have a model of each kind."""
    kind: Kind
    folder: Path
    """As `save_pretrained` writes it. It is read when the model is used, not before."""
    description: str = ""
    """One line."""
    licence: str = ""
    """An SPDX expression, for example `MIT`."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(f"a model cannot be named {self.name!r}: letters, digits, '.', '_' and '-' can be used")
        if self.kind not in get_args(Kind):
            raise ValueError(f"the model {self.name} has the kind {self.kind!r}: it must be one of {get_args(Kind)}")
        if not isinstance(self.folder, Path):
            raise ValueError(f"the folder of the model {self.name} must be a Path, not {self.folder!r}")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One caption and its score: higher is better, comparable among the candidates of one image only."""

    text: str
    score: float


@dataclass(frozen=True, slots=True)
class Record:
    """What is written about one captioned image."""

    path: str
    """As the user gave it. Bytes that are no UTF-8 are surrogates (`os.fsdecode`)."""
    sha256: str
    """Of the file's content, hexadecimal."""
    width: int
    """In pixels, after the EXIF rotation, before any resizing."""
    height: int
    captions: tuple[Candidate, ...]
    """Best first, at least one."""
    model: str
    seed: int

    @property
    def caption(self) -> str:
        """The best caption."""
        return self.captions[0].text


class Writer(Protocol):
    """The lines of one output format. The bytes are written as they are, so each row brings its own line end."""

    def header(self) -> bytes:
        """Return what comes before the first row. Called once, and not when a run goes on from a partial file."""

    def row(self, record: Record, first: bool) -> bytes:
        """Return one image's row; `first` tells whether it is the first of the file. Rows come in input order.

        It must depend on these arguments alone: after `--resume` another process writes the rest of the file.
        """

    def footer(self, empty: bool) -> bytes:
        """Return what comes after the last row; `empty` tells that the file holds no row. Called once."""


WriterFactory = Callable[[], Writer]


@dataclass(frozen=True)
class Capabilities:
    """What a captioner can do. Options that ask for more are refused by name before any image is read."""

    beams: bool
    sampling: bool
    prompts: bool
    """Takes `--prompt TEXT`."""
    candidates: bool
    """Gives more than one caption an image."""
    max_positions: int | None
    """The longest output in tokens, the start token included; None where nothing limits it."""


class Captioner(Protocol):
    """A loaded captioning model."""

    @property
    def name(self) -> str:
        """What stands in the output as the model of a caption."""

    @property
    def capabilities(self) -> Capabilities:
        """What this captioner can do."""

    def prepare(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Turn one RGB image of any size into the model's input, float32 (3, H, W), of one size for all images.

        Called from several threads at once.
        """

    def generate(
        self, pixels: npt.NDArray[np.float32], options: Mapping[str, Any], seeds: Sequence[int]
    ) -> list[list[Candidate]]:
        """Caption a batch: pixels float32 (B, 3, H, W), B seeds -> B lists of K candidates, best first.

        `options` are the settings of `dbcap caption` that govern decoding (`num_beams`, `max_length`, `num_captions`
        and so on) over `defaults()`. A row must not depend on the other rows: the same pixels, options and seed give
        the same candidates in any batch of B.
        """

    def defaults(self) -> Mapping[str, Any]:
        """Return the model's own decoding settings, used where the user gives none."""


CaptionerFactory = Callable[[Path, str, str], Captioner]
"""`factory(folder, device, dtype)`, for example `(Path("model"), "cuda:0", "bfloat16")`; raises `ModelError`."""


class Plugin:
    """Base class of plugins: override the hooks you need.

    True of every hook: it is called at most once in a process, when a command first needs its kind of thing. If it
    raises or returns something else than it should, the plugin is set aside (its other hooks are not used either), the
    user gets one line of warning and the command goes on; `dbcap plugins doctor` shows the fault. It must be quick
    (import torch inside what you return, not to return it) and idempotent: the same answer each time, nothing written
    or fetched. What it prints goes to stderr.
    """

    api_version: int = API_VERSION
    """Write the number you developed against into your class: a dbcap with another one leaves the plugin out."""

    def models(self) -> Iterable[Model]:
        """Return models that come with this distribution.

        Called when `--model` holds a plain name and by `dbcap models list`. An exception sets the plugin aside, and the
        command goes on. Must be quick (no look into the files) and idempotent.
        """
        return ()

    def captioners(self) -> Mapping[str, CaptionerFactory]:
        """Return factories for captioner classes that dbcap does not know, by the `model_type` in config.json.

        Called when a model to be loaded has a `model_type` that dbcap does not know. An exception sets the plugin
        aside, and the command goes on. Must be quick (the factory does the loading) and idempotent.
        """
        return {}

    def writers(self) -> Mapping[str, WriterFactory]:
        """Return factories of line writers, by the NAME that `--format NAME` takes. A run calls its factory once.

        Called when `--format` holds a name that dbcap does not know, and to list the names there are. An exception sets
        the plugin aside, and the command goes on. Must be quick and idempotent.
        """
        return {}
