"""How settings are written, and what of them a resumed run may change."""

import pytest
import yaml

from distgan import recipe
from distgan.errors import UserError
from distgan.recipe import Config, RunConfig, rules


@pytest.mark.parametrize(
    ("key", "listed", "joined"),
    [
        ("penalty.name", "[r1,r2]", "r1,r2"),
        ("augment.policy", "[color, cutout]", "color,cutout"),
        ("eval.metrics", "[fid,prdc]", "fid, prdc"),
        ("penalty.name", "[r1]", "r1"),
    ],
)
def test_a_list_of_names_and_a_text_with_commas_are_the_same_setting(tmp_path, key, listed, joined):
    group, name = key.split(".")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"run": {"dir": "x"}, group: {name: yaml.safe_load(listed)}}))
    argvs = ([f"--{key}={listed}"], [f"--{key}={joined}"])
    parsed = [recipe.parse(["--run.dir=x", *argv])[0] for argv in argvs] + [recipe.load(file)]
    assert parsed[0] == parsed[1] == parsed[2]
    (tmp_path / "saved.yaml").write_text(recipe.dump(parsed[0]))
    assert recipe.load(tmp_path / "saved.yaml") == parsed[0]
    assert recipe.mathematical_differences(parsed[0], parsed[1]) == []


def test_the_beginning_of_a_key_is_not_the_key():
    with pytest.raises(UserError, match=r'unknown key "train\.d_step": did you mean "train\.d_steps"'):
        recipe.parse(["--run.dir=x", "--train.d_step=3"])


def test_what_a_resumed_run_may_change_is_marked_and_everything_else_is_not():
    """The list of format 1: a key that is added is guarded until somebody marks it."""
    values = recipe.as_dict(Config(run=RunConfig(dir="x")))
    groups = {"checkpoint", "track", "eval", "guard"}
    keys = {f"{group}.{key}" for group in groups for key in values[group]}
    keys |= {"run.dir", "run.extend", "run.stop_at", "run.timeout", "data.path", "data.cache", "data.placement"}
    keys |= {"train.max_batch_per_device"}
    every = {f"{group}.{key}" for group in values for key in values[group]}
    assert {key for key in every if recipe.identity.is_beside(key)} == keys


LAZY = ["--penalty.name=r1", "--penalty.every=2", "--model.d_norm=none"]


@pytest.mark.parametrize(
    ("overrides", "where", "words"),
    [
        ([], {"on_gpu": False}, ["need a GPU"]),
        ([], {"world": 2}, ["2 processes"]),
        (["--train.precision=fp16"], {}, ["train.precision is fp16"]),
        (["--train.max_batch_per_device=8"], {"parts": 2}, ["train.max_batch_per_device is 8"]),
        (LAZY, {}, ["penalty.every is 2"]),
        (["--ramp.images=9", "--ramp.beta2=0.9"], {}, ["ramp.beta2 is 0.9"]),
        (["--ramp.images=9", "--penalty.weight=1", *LAZY[::2], "--ramp.penalty_weight=2"], {}, ["ramp.penalty_weight"]),
    ],
    ids=["cpu", "processes", "fp16", "accumulation", "lazy", "beta2", "penalty_weight"],
)
def test_a_step_that_cannot_be_captured_is_refused_and_auto_does_not_capture_it(overrides, where, words):
    there = {"on_gpu": True, "world": 1, "parts": 1, **where}
    graph, auto = (recipe.parse(["--run.dir=x", f"--train.compile={how}", *overrides])[0] for how in ("graph", "auto"))
    with pytest.raises(UserError) as refused:
        rules.how_steps_run(graph, **there)
    assert all(word in str(refused.value) for word in ["train.compile is graph", *words, "set it to off"])
    assert rules.how_steps_run(auto, **there) == "off"


@pytest.mark.parametrize("overrides", [[], [*LAZY, "--train.d_steps=2"], ["--augment.policy=ada"]])
def test_auto_captures_what_can_be_captured(overrides):
    found = recipe.parse(["--run.dir=x", "--train.compile=auto", *overrides])[0]
    assert rules.how_steps_run(found, on_gpu=True, world=1, parts=1) == "graph"
    assert rules.how_steps_run(Config(run=RunConfig(dir="x")), on_gpu=True, world=1, parts=1) == "off"
