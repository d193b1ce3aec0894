"""`dbcap generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dbcap.cli.command import command
from dbcap.cli.help import App
from dbcap.config.models import CommonConfig, GenerateConfig

if TYPE_CHECKING:
    from dbcap.events import Events
    from dbcap.generation.run import GenerateReport

app = App()


@app.command()
@command(GenerateConfig)
def generate(config: GenerateConfig, common: CommonConfig, events: Events) -> GenerateReport:
    """Make images from prompts.

    Prints the path of each image. The same command again makes only what is missing. Examples:

      dbcap generate "a photo of a red fox in the snow" -n 4 --seed 1
      dbcap generate @prompts.txt --out foxes --grid foxes.png
      dbcap generate "a {red|blue} {car|bike}" --expand --dry-run
    """
    from dbcap.generation.run import run

    return run(config, common, events)
