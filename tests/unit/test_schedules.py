"""Schedules are torch's."""

import pytest
import torch
from support.programs import launch
from support.runs import TINY, metrics

from distgan.schedules import Rates, between


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_are_torchs(schedule):
    def adam():
        return torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)

    theirs = adam()
    scheduler = {
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(theirs, factor=1.0),
        "linear": lambda: torch.optim.lr_scheduler.PolynomialLR(theirs, total_iters=50, power=1.0),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=50),
    }[schedule]()
    ours = {"generator": adam(), "discriminator": adam()}
    rates = Rates(ours, lr=3e-4, schedule=schedule, steps=50)
    for step in range(50):
        rates.set(step)
        expected = theirs.param_groups[0]["lr"]
        assert rates.now == pytest.approx({"lr/generator": expected, "lr/discriminator": expected}, rel=1e-9)
        theirs.step()
        scheduler.step()
    rates.set(50)
    assert rates.now["lr/generator"] == pytest.approx(3e-4 if schedule == "constant" else 0, abs=1e-18)


def test_a_base_that_a_rollback_lowered_lowers_all_that_follows():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    rates = Rates({"generator": optimizer}, lr=1.0, schedule="linear", steps=4)
    rates.base["generator"] = 0.5
    rates.set(1)
    assert rates.now == {"lr/generator": 0.375}


def test_a_curve_stays_where_it_ends():
    for curve in ("linear", "cosine"):
        assert between(curve, 2.0, 5.0, 7.0) == pytest.approx(5.0)
        assert between(curve, 2.0, 5.0, 0.5) == pytest.approx(3.5)


def test_a_run_trains_at_its_schedules_rates(tmp_path):
    argv = [*TINY, "--train.steps=4", "--track.log_every=1"]
    for schedule in ("constant", "linear"):
        assert launch([*argv, f"--run.dir={tmp_path / schedule}", f"--optim.schedule={schedule}"]) == [0]
    linear, constant = (metrics(tmp_path / schedule) for schedule in ("linear", "constant"))
    assert [line["lr/generator"] for line in linear] == pytest.approx([2e-4, 1.5e-4, 1e-4, 5e-5])
    same = [a["loss/generator"] == b["loss/generator"] for a, b in zip(linear, constant, strict=True)]
    assert same == [True, False, False, False]  # G's loss comes after D's update of the same step
