"""What each ZeRO preset would take for a Config, worked out from the model's config.json."""

from __future__ import annotations

from hynb.config import Config
from hynb.widgets.table import Table


def preset_costs(config: Config) -> Table | str:
    """One row a preset: memory of a GPU and of the host; or in words why it can't be told."""
    return "not yet"


def memory_plan(config: Config) -> Table:
    """What the run takes."""
    return Table(columns=("what", "bytes"), rows=[])
