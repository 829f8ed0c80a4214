"""Every recipe is one: it starts, has its paper's settings, and its header gives the command that runs it."""

import re

import pytest
import yaml
from support.runs import REPOSITORY

from distgan import cli, models, recipe

RECIPES = sorted(path for path in (REPOSITORY / "configs").glob("*.yaml") if path.stem != "sweep")

# Loss, what holds D, architecture, widths of G and D, latents, labels; rate, schedule, betas; batch, D steps: as each
# recipe's header and docs/recipes.md say whose they are.
SETTINGS = {
    "cifar10_dcgan": ("non_saturating", "batch", "dcgan", 128, 128, 100, False, 2e-4, "constant", (0.5, 0.999), 128, 1),
    "cifar10_dcgan64": ("non_saturating", "batch", "dcgan", 64, 64, 100, False, 2e-4, "constant", (0.5, 0.999), 128, 1),
    "cifar10_lsgan": ("least_squares", "batch", "dcgan", 128, 128, 100, False, 2e-4, "constant", (0.5, 0.999), 128, 1),
    "cifar10_wgan": ("wasserstein", "clip 0.1", "dcgan", 128, 128, 100, False, 2e-4, "linear", (0.0, 0.9), 128, 1),
    "cifar10_wgan_gp": ("wasserstein", "wgan_gp 10", "resnet", 128, 128, 128, False, 2e-4, "linear", (0.0, 0.9), 64, 5),
    "cifar10_sngan": ("hinge", "spectral", "resnet", 256, 128, 128, False, 2e-4, "linear", (0.0, 0.9), 64, 5),
    "cifar10_sngan_cond": ("hinge", "spectral", "resnet", 256, 128, 128, True, 2e-4, "constant", (0.5, 0.999), 64, 5),
    "cifar10_biggan": ("hinge", "spectral", "biggan", 96, 96, 80, True, 2e-4, "constant", (0.5, 0.999), 64, 5),
    "cifar10_biggan_diffaug": ("hinge", "spectral", "biggan", 96, 96, 80, True, 2e-4, "constant", (0.5, 0.999), 64, 5),
    "cifar10_r3gan": ("relativistic", "r1,r2 0.05", "r3gan", 768, 768, 64, True, 2e-4, "constant", (0.0, 0.9), 512, 1),
}


@pytest.mark.parametrize("file", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_starts_and_gives_its_command(file, tmp_path, capfd):
    parsed = recipe.load(file)
    assert parsed.run.dir == f"runs/{file.stem}"
    here = ["--data.source=digits", "--data.id=null", "--data.path=null", "--eval.every=null", f"--run.dir={tmp_path}"]
    assert cli.main(["train", "--check", "--config", str(file), *here]) == 0
    assert f"architecture: {parsed.model.architecture}" in capfd.readouterr().out
    header = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"-m distgan.train --config configs/{file.name}" in header
    for words in re.findall(r"--config configs/\S+\.yaml \\\n#( +--.*)", header):
        overrides = [word for word in words.split("#")[0].split() if word.startswith("--")]
        assert overrides
        recipe.parse(["--config", str(file), *overrides])
    assert "Receipt:" in header


@pytest.mark.parametrize("name", SETTINGS)
def test_a_recipe_has_its_papers_settings(name):
    c = recipe.load(REPOSITORY / "configs" / f"{name}.yaml")
    model, optim = c.model, c.optim
    held = f"{c.penalty.name} {c.penalty.weight:g}" if c.penalty.name else models.d_norm(model)
    held = f"clip {optim.clip_weights:g}" if optim.clip_weights else held
    networks = (model.architecture, model.width, model.d_width or model.width, model.latent_dim, model.conditional)
    updates = (optim.lr, optim.schedule, tuple(optim.betas), c.train.batch_size, c.train.d_steps)
    assert (c.loss.name, held, *networks, *updates) == SETTINGS[name]
    assert model.init == ("orthogonal" if name == "cifar10_sngan_cond" else "paper")


@pytest.mark.parametrize("launch", sorted((REPOSITORY / "launch").glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_files_are_topology_only(launch):
    keys = yaml.safe_load(launch.read_text()).keys()
    assert not keys & {"mixed_precision", "gradient_accumulation_steps", "dynamo_config", "fsdp_config"}


def test_r3gans_and_biggans_recipes_have_the_rest_of_the_published_settings():
    """Huang et al. 2024, table 9, and train.py of their code; StudioGAN's BigGAN.yaml and BigGAN-DiffAug.yaml."""
    r3gan, biggan, augmented = (
        recipe.load(REPOSITORY / "configs" / f"cifar10_{name}.yaml") for name in ("r3gan", "biggan", "biggan_diffaug")
    )
    assert r3gan.ramp == recipe.RampConfig(
        images=20_000_000, lr=5e-5, beta2=0.99, penalty_weight=0.005, half_life=5e6, probability=0.55
    )
    assert (r3gan.augment.policy, r3gan.augment.probability) == ("ada_r3gan", 0)
    assert (r3gan.ema.half_life, r3gan.ema.ramp) == (0, None)
    assert (r3gan.train.g_batch, r3gan.train.precision) == ("own", "bf16")
    assert r3gan.train.steps * 512 == pytest.approx(250e6, rel=1e-6)
    for c, steps, policy in ((biggan, 100_000, None), (augmented, 200_000, "color,translation,cutout")):
        assert (c.train.steps, c.augment.policy, c.ema.start, c.ema.ramp) == (steps, policy, 1000, None)
        assert 0.5 ** (c.images_per_step / c.ema.half_life) == pytest.approx(0.9999, abs=1e-9)
