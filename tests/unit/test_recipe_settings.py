"""How settings are written, and what of them a resumed run may change."""

import pytest
import yaml

from distgan import recipe
from distgan.errors import UserError
from distgan.recipe import Config, RunConfig


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
