"""What somebody who adds a loss, penalty, augmentation, network or metric must not forget."""

import re

import pytest
from support.runs import REPOSITORY, TINY, VARIANTS

from distgan import models, recipe
from distgan.evaluation import FORMULAS
from distgan.objective import augment, losses, penalties

REGISTRIES = {
    "loss.name": losses.LOSSES,
    "penalty.name": penalties.PENALTIES,
    "augment.policy": augment.AUGMENTATIONS | augment.PIPELINES,
    "model.architecture": models.ARCHITECTURES,
    "eval.metrics": {name: None for names in recipe.EVAL_METRICS.values() for name in names},
}


@pytest.fixture(scope="module")
def settings():
    """The text of `--help` for each key."""
    text = (REPOSITORY / "distgan" / "recipe" / "groups.py").read_text()
    found = re.findall(r'^class (\w+)Config:|^    (\w+): .+\n    """((?:.|\n)+?)"""', text, re.MULTILINE)
    said, group = {}, ""
    for name, key, help_text in found:
        group = name.lower() or group
        said[f"{group}.{key}"] = " ".join(help_text.split())
    return said


@pytest.mark.parametrize("key", REGISTRIES)
def test_help_and_documents_have_every_name_of_a_registry(key, settings):
    document = "docs/evaluation.md" if key == "eval.metrics" else "docs/recipes.md"
    lines = [line for line in (REPOSITORY / document).read_text().splitlines() if line.startswith("| `")]
    row = "\n".join(line for line in lines if key == "eval.metrics" or line.startswith(f"| `{key}`"))
    readme = (REPOSITORY / "README.md").read_text()
    for name in REGISTRIES[key]:
        listed = re.search(rf"(^|[ ,]){name}[,.;]", settings[key].replace("`", ""))
        assert listed, f"add {name} to the docstring of {key} in recipe/groups.py"
        assert f"`{name}`" in row, f"add {name} to the table in {document}"
        assert key != "eval.metrics" or f"`{name}`" in readme, f"add {name} to the table of metrics in README.md"


def test_the_recipe_knows_which_augmentations_have_a_probability():
    assert set(recipe.WITH_PROBABILITY) == augment.PIPELINES.keys(), (
        "name a new pipeline in WITH_PROBABILITY of recipe/groups.py"
    )


def test_every_metric_has_a_formula():
    for names in recipe.EVAL_METRICS.values():
        assert set(names.values()) <= FORMULAS.keys(), "EVAL_METRICS names a formula that evaluation.FORMULAS lacks"
    scores = {name for names in recipe.EVAL_METRICS.values() for name in names if names[name] == "inception_score"}
    assert set(recipe.HIGHER_IS_BETTER) == scores, "a new formula whose larger values are better belongs here, too"


def test_the_variants_have_every_name_of_a_registry():
    """The tests of processes, resumes and counts run over these variants."""
    forgotten = "add it to a variant in tests/support/runs.py: VARIANTS"
    parsed = [recipe.parse([*TINY, *variant, "--run.dir=run"])[0] for variant in ([], *VARIANTS.values())]
    assert {c.loss.name for c in parsed} == losses.LOSSES.keys(), forgotten
    assert {name for c in parsed for name in c.penalty.names} == penalties.PENALTIES.keys(), forgotten
    augmentations = {*augment.AUGMENTATIONS, *augment.PIPELINES}
    assert {name for c in parsed for name in c.augment.names} == augmentations, forgotten
    assert {(c.model.architecture, models.d_norm(c.model)) for c in parsed} == {
        (name, norm) for name, architecture in models.ARCHITECTURES.items() for norm in architecture.d_norms
    }, forgotten
    assert {(c.model.architecture, c.model.conditional) for c in parsed} == {
        (name, labels) for name in models.ARCHITECTURES for labels in (False, True)
    }, forgotten
    assert {c.optim.schedule for c in parsed} == {"constant", "linear", "cosine"}, forgotten
    assert {c.augment.adaptive for c in parsed} == {c.train.g_batch == "own" for c in parsed} == {False, True}
    assert {c.optim.clip_weights is None for c in parsed} == {c.penalty.every == 1 for c in parsed} == {False, True}
