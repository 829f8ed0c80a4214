"""A run's recipe: its settings, how they are read, which cannot be combined, and when two recipes are the same run."""

from distgan.recipe.groups import (
    EVAL_METRICS,
    HIGHER_IS_BETTER,
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
    RunConfig,
    TrackConfig,
    TrainConfig,
)
from distgan.recipe.identity import as_dict, common, mathematical_differences
from distgan.recipe.parsing import dump, load, parse

__all__ = [
    "EVAL_METRICS",
    "HIGHER_IS_BETTER",
    "AugmentConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EmaConfig",
    "EvalConfig",
    "GuardConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "PenaltyConfig",
    "RunConfig",
    "TrackConfig",
    "TrainConfig",
    "as_dict",
    "common",
    "dump",
    "load",
    "mathematical_differences",
    "parse",
]
