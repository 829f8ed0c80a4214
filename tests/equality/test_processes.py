"""The same updates on any number of processes."""

import functools

import pytest
import torch
from support.programs import (
    cubic_loss,
    float64,
    launch,
    plain_networks,
    same_images_on_all_ranks,
    same_latents_on_all_ranks,
    slope_penalty,
    slow_to_prepare,
)
from support.runs import REPOSITORY, TINY, VARIANTS, metrics

from distgan.storage.tensors import read as read_tensors

PLAIN = [
    "--model.architecture=plain",
    "--model.width=8",
    "--model.latent_dim=16",
    "--data.flip=true",
    "--train.batch_size=24",
    "--track.to=none",
    "--track.log_every=1",
]
LOSSES = ("loss/discriminator", "loss/generator", "score/real", "score/fake_before", "score/fake_after")


def losses_of(tmp_path, name, world, setups, *overrides):
    run = tmp_path / f"{name}-{world}"
    assert (
        launch([*PLAIN, f"--run.dir={run}", *overrides], world=world, setups=[plain_networks, *setups]) == [0] * world
    )
    return [record[key] for record in metrics(run) for key in LOSSES]


@pytest.mark.parametrize(("setups", "steps", "tolerance"), [([], 5, 1e-6), ([float64], 20, 1e-9)], ids=["fp32", "fp64"])
def test_losses_do_not_depend_on_the_number_of_processes(tmp_path, setups, steps, tolerance):
    one, two, three = (losses_of(tmp_path, "run", n, setups, f"--train.steps={steps}") for n in (1, 2, 3))
    assert len(one) == steps * len(LOSSES)
    assert two == pytest.approx(one, rel=tolerance, abs=0)
    assert three == pytest.approx(one, rel=tolerance, abs=0)
    if not setups:
        for fault in (same_images_on_all_ranks, same_latents_on_all_ranks):
            faulty = losses_of(tmp_path, fault.__name__, 2, [fault], f"--train.steps={steps}")
            assert faulty != pytest.approx(one, rel=1e-4, abs=0)  # the test above would have seen it


# The DCGAN recipe, narrow. At a higher rate than its own, Adam's first steps turn rounding into larger differences.
DCGAN = [f"--config={REPOSITORY}/configs/cifar10_dcgan.yaml", "--data.source=digits", "--model.width=8"]
DCGAN += ["--train.batch_size=24", "--track.to=none", "--track.log_every=1"]


@pytest.mark.parametrize(("setups", "steps", "tolerance"), [([], 5, 1e-3), ([float64], 20, 1e-9)], ids=["fp32", "fp64"])
def test_losses_of_a_dcgan_with_synchronised_batch_norm_equal_across_process_counts(tmp_path, setups, steps, tolerance):
    def dcgan(world, *overrides):
        run = tmp_path / f"{world}{len(overrides)}"
        argv = [*DCGAN, f"--run.dir={run}", f"--train.steps={steps}", *overrides]
        assert launch(argv, world=world, setups=setups) == [0] * world
        return [record[key] for record in metrics(run) for key in LOSSES]

    one = dcgan(1)
    for world in (2, 3, 4):
        assert dcgan(world) == pytest.approx(one, rel=tolerance, abs=0)
    assert dcgan(2, "--model.sync_batchnorm=false") != pytest.approx(one, rel=tolerance, abs=0)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_losses_beyond_dcgan_equal_across_process_counts(tmp_path, variant):
    def losses(world):
        run = tmp_path / str(world)
        argv = [*TINY, *variant, f"--run.dir={run}", "--train.steps=6", "--track.log_every=1"]
        assert launch(argv, world=world, setups=[float64]) == [0] * world
        return [record[key] for record in metrics(run) for key in record if key.startswith(("loss/", "score/"))]

    one = losses(1)
    penalised = any(override.startswith("--penalty") for override in variant)
    assert len(one) == 6 * (len(LOSSES) + penalised)
    assert len(set(one)) >= 6 * len(LOSSES)
    for world in (2, 3):
        assert losses(world) == pytest.approx(one, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "overrides",
    [
        ["--loss.name=cubic", "--penalty.name=slope,slope_of_fakes", "--penalty.every=3", "--train.g_batch=own"],
        [
            *("--loss.name=relativistic", "--augment.policy=color,translation,cutout", "--model.conditional=true"),
            *("--model.d_norm=spectral", "--penalty.name=r1,wgan_gp"),
        ],
        ["--loss.name=hinge", "--model.conditional=true"],
    ],
    ids=["outside", "everything", "unpaired-labels"],
)
def test_gradients_that_accumulate_over_pieces_make_the_same_updates(tmp_path, overrides, world):
    setups = [float64, cubic_loss, slope_penalty]
    overrides = [*overrides, "--train.d_steps=2", "--train.steps=6"]
    whole = losses_of(tmp_path, "whole", 1, setups, *overrides)
    pieces = losses_of(tmp_path, "pieces", world, setups, *overrides, "--train.max_batch_per_device=5")
    assert pieces == pytest.approx(whole, rel=1e-9, abs=0)


@pytest.mark.parametrize("penalty", ["wgan_gp", "r1,r2"])
def test_a_penalised_update_is_that_of_one_process(tmp_path, penalty):
    """Weights after two steps of five discriminator updates each, also where gradients accumulate."""

    def weights(name, world, *overrides):
        run = tmp_path / name
        argv = [*PLAIN, f"--run.dir={run}", f"--penalty.name={penalty}", "--train.d_steps=5", "--train.steps=2"]
        assert launch([*argv, *overrides], world=world, setups=[plain_networks, float64]) == [0] * world
        (folder,) = (run / "checkpoints").glob("step_00000002")
        names = ("generator", "discriminator", "discriminator_optimizer")
        return {f"{file}.{key}": t for file in names for key, t in read_tensors(folder / f"{file}.safetensors").items()}

    one = weights("one", 1)
    assert all(tensor.dtype == torch.float64 for name, tensor in one.items() if not name.endswith("step"))
    pieces = "--train.max_batch_per_device=4"
    for name, world, overrides in (("two", 2, []), ("three", 3, []), ("parts", 1, [pieces]), ("both", 2, [pieces])):
        other = weights(name, world, *overrides)
        for key, tensor in one.items():
            torch.testing.assert_close(other[key], tensor, rtol=1e-9, atol=1e-12)


def test_accumulation_is_refused_with_batch_norm_unless_the_share_fits(tmp_path):
    log = tmp_path / "log"
    argv = [*PLAIN, "--model.architecture=dcgan", "--model.width=4", "--train.steps=1", f"--run.dir={tmp_path / 'run'}"]
    assert launch([*argv, "--train.max_batch_per_device=23"], log=log) == [2]
    assert "but batch norm (in generator and discriminator) would then see each part by itself" in log.read_text()
    assert launch([*argv, "--train.max_batch_per_device=12"], world=2) == [0, 0]


def test_a_penalty_on_a_discriminator_with_batch_norm_is_refused(tmp_path):
    log = tmp_path / "log"
    argv = [*PLAIN, "--model.architecture=dcgan", f"--run.dir={tmp_path / 'run'}"]
    assert launch([*argv, "--penalty.name=r1"], log=log) == [2]
    assert "the gradient at one image depends on the others of its batch" in log.read_text()


def test_a_machine_that_prepares_its_images_slowly_does_not_time_the_others_out(tmp_path):
    argv = [*PLAIN, f"--run.dir={tmp_path / 'run'}", "--train.steps=1"]
    assert launch(argv, world=2, setups=[plain_networks, functools.partial(slow_to_prepare, 1, 6)]) == [0, 0]


def test_a_paired_loss_and_a_penalty_from_outside_fit_the_loop_on_any_number_of_processes(tmp_path):
    setups = [float64, cubic_loss, slope_penalty]
    overrides = ["--loss.name=cubic", "--train.d_steps=3", "--train.steps=6"]
    penalised = [*overrides, "--penalty.name=slope,slope_of_fakes"]
    one, two, three = (losses_of(tmp_path, "run", n, setups, *penalised) for n in (1, 2, 3))
    assert two == pytest.approx(one, rel=1e-9, abs=0)
    assert three == pytest.approx(one, rel=1e-9, abs=0)
    without = losses_of(tmp_path, "plain", 1, setups, *overrides)
    assert without != pytest.approx(one, rel=1e-3, abs=0)  # the penalty took part
