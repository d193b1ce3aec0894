"""`dbcap resume`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dbcap.cli.command import command
from dbcap.cli.help import App
from dbcap.config.models import CommonConfig, ResumeConfig

if TYPE_CHECKING:
    from dbcap.events import Events
    from dbcap.training.run import TrainReport

app = App()


@app.command()
@command(ResumeConfig, given="train")
def resume(config: ResumeConfig, common: CommonConfig, events: Events, given: Mapping[str, Any]) -> TrainReport:
    """Go on with a run that was interrupted, exact to the bit.

    Of the settings of `dbcap train` those of the run itself (checkpoints, samples, workers) may be changed by --set,
    as in --set train.keep=5. Examples:

      dbcap resume
      dbcap resume dog --max-time 2h --set train.checkpoint_every=50
      dbcap resume dog --steps 1600
      dbcap resume dog --from best --name dog-2 --steps 1200
    """
    from dbcap.training.run import resume as run

    return run(config, given, common, events)
