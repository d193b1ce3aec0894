"""A model that comes with the distribution, and an output format."""

from __future__ import annotations

from pathlib import Path

from dbcap.plugins.api import Model, Plugin, Record, WriterFactory


class Upper:
    """`--format upper`: the path, a tab and the caption in capital letters."""

    def header(self) -> bytes:
        return b""

    def row(self, record: Record, first: bool) -> bytes:  # noqa: ARG002
        return f"{record.path}\t{record.caption.upper()}\n".encode("utf-8", "surrogateescape")

    def footer(self, empty: bool) -> bytes:  # noqa: ARG002
        return b""


class Good(Plugin):
    """`--model good-tiny` and `--format upper`."""

    api_version = 1

    def models(self) -> list[Model]:
        folder = Path(__file__).parent / "model"
        return [Model("good-tiny", kind="captioner", folder=folder, description="A small example", licence="MIT")]

    def writers(self) -> dict[str, WriterFactory]:
        return {"upper": Upper}


plugin = Good()
