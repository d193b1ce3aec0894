"""Imports well, and fails when it is asked for its models."""

from __future__ import annotations

from dbcap.plugins.api import Model, Plugin


class BrokenHook(Plugin):
    """Its hook does not return."""

    api_version = 1

    def models(self) -> list[Model]:
        raise RuntimeError("the list of models is\nnot to be had")
