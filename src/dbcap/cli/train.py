"""`dbcap train`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dbcap.cli.command import command
from dbcap.cli.help import App
from dbcap.config.models import CommonConfig, TrainConfig

if TYPE_CHECKING:
    from dbcap.events import Events
    from dbcap.training.run import TrainReport

app = App()


@app.command()
@command(TrainConfig, given="train")
def train(config: TrainConfig, common: CommonConfig, events: Events, given: Mapping[str, Any]) -> TrainReport:
    """Train a personal model from a few photos.

    Prints the folder of the model. Ctrl-C keeps what is done, and `dbcap resume` goes on, exact to the bit. Examples:

      dbcap train my-dog --name dog
      dbcap train photos/ --class-word dog --method lora --steps 1200
      dbcap train my-dog --prior prediction --ema --max-time 6h
    """
    from dbcap.training.run import train as run

    return run(config, given, common, events)
