"""`dbcap caption`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dbcap.cli.command import command
from dbcap.cli.help import App
from dbcap.config.models import CaptionConfig, CommonConfig

if TYPE_CHECKING:
    from dbcap.captioning.run import CaptionReport
    from dbcap.events import Events

app = App()


@app.command()
@command(CaptionConfig)
def caption(config: CaptionConfig, common: CommonConfig, events: Events) -> CaptionReport:
    """Caption images.

    One image prints its caption alone; several print `path<TAB>caption`. Examples:

      dbcap caption photo.jpg
      dbcap caption photos -r --format jsonl -o captions.jsonl
      find . -name '*.jpg' -print0 | dbcap caption -0 - --format sidecar
    """
    from dbcap.captioning.run import run

    return run(config, common, events)
