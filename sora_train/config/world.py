"""Settings of the procedural world: which corpus `python -m data_pipelines.world` renders."""

from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    simple = "simple"  # one object of 4 colors x 3 shapes x 5 motions on a plain background
    full = "full"  # textures, several objects, bounces, occlusion, count changes, cuts, camera moves


@dataclass(frozen=True)
class WorldConfig:
    # Folder for the clips; one that holds a corpus of other settings is refused.
    output: str = "???"
    # How many; a larger number than last time adds clips to the folder.
    clips: int = 600
    seed: int = 0
    level: Level = Level.simple
    # Leave out the sixth of the (color, shape, motion) triples on which generalisation is scored.
    exclude_held_out: bool = False
    # Rendering processes; 0 takes one for each CPU core.
    workers: int = 0
