"""The same updates on any number of processes."""

import pytest
from conftest import metrics
from programs import (
    float64,
    launch,
    paired_loss,
    plain_networks,
    r1,
    same_images_on_all_ranks,
    same_latents_on_all_ranks,
)

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


def test_a_paired_loss_and_a_penalty_from_outside_fit_the_loop_on_any_number_of_processes(tmp_path):
    setups = [float64, paired_loss, r1]
    overrides = ["--loss.name=paired", "--train.d_steps=3", "--train.steps=6"]
    one, two, three = (losses_of(tmp_path, "run", n, setups, *overrides) for n in (1, 2, 3))
    assert two == pytest.approx(one, rel=1e-9, abs=0)
    assert three == pytest.approx(one, rel=1e-9, abs=0)
    without = losses_of(tmp_path, "plain", 1, setups[:2], *overrides)
    assert without != pytest.approx(one, rel=1e-3, abs=0)  # the penalty took part
