"""The whole way of `dbcap prep`: photos > data set > class images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dbcap.config.base import CommonConfig
from dbcap.config.training import PrepConfig
from dbcap.dataset import class_images
from dbcap.dataset.prepare import PrepReport, prepare
from dbcap.events import Events


def run(config: PrepConfig, common: CommonConfig, events: Events) -> PrepReport:
    """Prepare photos, and make the class images that are missing. Raises DbcapError and Interrupted as both do."""
    report = prepare(config, config.photos, Path(str(config.out)), common, events)
    found = class_images.ensure(report.dataset, report.local, config.device, common, events)
    return replace(report, class_images=len(found))
