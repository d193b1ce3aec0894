"""The starter models of dbcap, and pictures for them."""

from __future__ import annotations

from pathlib import Path

from dbcap.plugins.api import Model, Plugin

_HERE = Path(__file__).parent


class Starter(Plugin):
    """Gives the name `starter` to a captioner and to a diffusion model."""

    api_version = 1

    def models(self) -> list[Model]:
        """Return the captioner and the diffusion model."""
        return [
            Model(
                "starter",
                kind="captioner",
                folder=_HERE / "captioner",
                description="Captions 64x64 pictures of one thing on a plain colour; for trying things out",
                licence="MIT AND Apache-2.0",
            ),
            Model(
                "starter",
                kind="diffusion",
                folder=_HERE / "diffusion",
                description="Makes 64x64 pictures of one of 120 things on a plain colour; for trying things out",
                licence="MIT AND Apache-2.0",
            ),
        ]


def samples() -> Path:
    """Return the folder of 24 pictures (64x64 PNG) that has their captions in `metadata.jsonl`."""
    return _HERE / "samples"
