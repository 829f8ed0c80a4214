"""distgan's public interface in Python. docs/api.md shows each part in an example.

Functions that say "Collective" run on one process, or on all processes of `accelerate launch`, `torchrun`, `srun` or
`mpirun`, which then share the work.
"""

from distgan.applications.inversion import Inverted, invert
from distgan.applications.repair import Repaired, inpaint
from distgan.applications.synthetic import Synthesized, synthesize
from distgan.errors import LostRankError, NotFiniteError, NotSavedError, StoppedError, TroubleError, UserError
from distgan.evaluate import evaluate
from distgan.models import Generator
from distgan.recipe import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EmaConfig,
    EvalConfig,
    GuardConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PenaltyConfig,
    RampConfig,
    RunConfig,
    TrackConfig,
    TrainConfig,
)
from distgan.storage.exported import load_generator
from distgan.storage.latents import Latents
from distgan.storage.report import Report
from distgan.train import train

__all__ = [
    "AugmentConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EmaConfig",
    "EvalConfig",
    "Generator",
    "GuardConfig",
    "Inverted",
    "Latents",
    "LossConfig",
    "LostRankError",
    "ModelConfig",
    "NotFiniteError",
    "NotSavedError",
    "OptimConfig",
    "PenaltyConfig",
    "RampConfig",
    "Repaired",
    "Report",
    "RunConfig",
    "StoppedError",
    "Synthesized",
    "TrackConfig",
    "TrainConfig",
    "TroubleError",
    "UserError",
    "evaluate",
    "inpaint",
    "invert",
    "load_generator",
    "synthesize",
    "train",
]
