"""What is due after a step follows from the recipe alone."""

from distgan.recipe import CheckpointConfig, Config, EvalConfig, RunConfig, TrackConfig, TrainConfig
from distgan.run.due import Due, due


def test_what_is_due_follows_from_the_recipe():
    config = Config(
        run=RunConfig(dir="x", extend=1),
        train=TrainConfig(steps=9),
        track=TrackConfig(log_every=4, sample_every=6),
        eval=EvalConfig(every=5),
        checkpoint=CheckpointConfig(every=3),
    )
    nothing = Due(evaluate=False, log=False, sample=False, save=False, end=False)
    assert due(1, config) == nothing
    assert due(3, config) == Due(evaluate=False, log=False, sample=False, save=True, end=False)
    assert due(4, config) == Due(evaluate=False, log=True, sample=False, save=False, end=False)
    assert due(5, config) == Due(
        evaluate=True, log=True, sample=False, save=False, end=False
    )  # an evaluation is logged
    assert due(6, config) == Due(evaluate=False, log=False, sample=True, save=True, end=False)
    assert due(10, config) == Due(evaluate=True, log=True, sample=True, save=False, end=True)  # steps and extend
