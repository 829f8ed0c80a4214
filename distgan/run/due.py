"""Decides from the recipe alone what is due after a step."""

from dataclasses import dataclass

from distgan.recipe import Config


@dataclass(frozen=True)
class Due:
    """The things that are due after a step, the same on every rank."""

    evaluate: bool
    log: bool
    sample: bool
    save: bool
    end: bool
    """Whether the run is complete."""


def due(step: int, config: Config) -> Due:
    """Tells what is due after a step. The first step of a run is 1."""
    end = step == config.last_step
    evaluate = config.eval.every is not None and (step % config.eval.every == 0 or end)
    return Due(
        evaluate=evaluate,
        log=step % config.track.log_every == 0 or end or evaluate,
        sample=step % config.track.sample_every == 0 or end,
        save=step % config.checkpoint.every == 0,
        end=end,
    )
