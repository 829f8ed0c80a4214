"""Every recipe is one: it parses, and its header gives the command that runs it."""

import dataclasses
import re

import pytest
import yaml
from conftest import REPOSITORY

from distgan import config, losses, models
from distgan.augment import Augment
from distgan.penalties import Penalties

RECIPES = sorted(path for path in (REPOSITORY / "configs").glob("*.yaml") if path.stem != "sweep")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_gives_its_command(recipe):
    parsed = config.load(recipe)
    held = parsed.model.d_norm == "spectral" or bool(parsed.penalty.names)
    losses.check(losses.build(parsed.loss.name), parsed.loss.name, clip=parsed.optim.clip_weights, held=held)
    Augment(parsed.augment.names)
    Penalties(parsed.penalty, mixed_precision=False)
    classes = (1,) * 10 if parsed.model.conditional else ()
    narrow = dataclasses.replace(parsed.model, width=2, d_width=2)
    models.build(narrow, models.Shape(image_size=parsed.data.image_size, channels=3, class_counts=classes), seed=0)
    header = "".join(line for line in recipe.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"-m distgan.train --config configs/{recipe.name}" in header
    for words in re.findall(r"--config configs/\S+\.yaml \\\n#( +--.*)", header):
        overrides = [word for word in words.split("#")[0].split() if word.startswith("--")]
        assert overrides
        config.parse(["--config", str(recipe), *overrides])
    assert "Receipt:" in header
    assert parsed.run.dir == f"runs/{recipe.stem}"


@pytest.mark.parametrize("launch", sorted((REPOSITORY / "launch").glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_files_are_topology_only(launch):
    keys = yaml.safe_load(launch.read_text()).keys()
    assert not keys & {"mixed_precision", "gradient_accumulation_steps", "dynamo_config", "fsdp_config"}
