"""Penalties against closed forms, where they are computed, and in which precision."""

import functools
import json
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from support.programs import launch, note_tf32, processes
from support.runs import TINY
from torch import nn

from distgan.data import Batch
from distgan.models import ImageSpec, build
from distgan.objective import Objective, losses, penalties
from distgan.objective.augment import Augment
from distgan.objective.penalties import Due, Penalties, penalised
from distgan.parallel.ranks import Ranks, without_autocast
from distgan.recipe import AugmentConfig, Config, ModelConfig, PenaltyConfig, RunConfig, TrainConfig

SHAPE = (6, 2, 3, 3)


class Quadratic(nn.Module):
    """l(x) = x^T A x / 2 + b^T x, whose gradient is A x + b."""

    def __init__(self):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        a = torch.randn(18, 18, dtype=torch.float64, generator=rng) / 4
        self.a, self.b = a + a.t(), nn.Parameter(torch.randn(18, dtype=torch.float64, generator=rng))

    def forward(self, x, y=None):
        flat = x.flatten(1)
        return 0.5 * ((flat @ self.a) * flat).sum(1) + flat @ self.b

    def slope(self, x):
        """(N, 18)."""
        return x.flatten(1) @ self.a + self.b


class Given(NamedTuple):
    """What a penalty is computed from."""

    critic: Callable
    draw: Callable
    real: torch.Tensor
    real_logits: torch.Tensor
    fake: torch.Tensor
    fake_logits: torch.Tensor


def given(network, *, on_real=False, on_fake=False):
    rng = torch.Generator().manual_seed(1)
    real, fake = (torch.randn(2, *SHAPE, dtype=torch.float64, generator=rng)).unbind()
    share = torch.rand(6, 1, dtype=torch.float64, generator=rng)
    real.requires_grad_(on_real)
    fake.requires_grad_(on_fake)
    logits = (network(real, None), network(fake, None))
    return Given(lambda x, which: network(x), lambda stream, count: share, real, logits[0], fake, logits[1])


def value_of(due, seen):
    return penalised(
        due, seen.critic, seen.draw, real=(seen.real, seen.real_logits), fake=(seen.fake, seen.fake_logits)
    )


def alone(name, *, reuse=True):
    """One penalty of weight 1."""
    return Due({name: 1.0}, reuse)


def closed_form(name, critic, seen):
    """Value and gradient with respect to b."""
    if name == "wgan_gp":
        share = seen.draw("penalty", 1)[:, :, None, None]
        slope = critic.slope((share * seen.real + (1 - share) * seen.fake).detach())
        norm = slope.norm(dim=1, keepdim=True)
        return ((norm - 1) ** 2).mean(), (2 * (norm - 1) * slope / norm).mean(0)
    slope = critic.slope((seen.real if name == "r1" else seen.fake).detach())
    return slope.square().sum(1).mean() / 2, slope.mean(0)


@pytest.mark.parametrize("name", penalties.PENALTIES)
@pytest.mark.parametrize("reuse", [False, True])
def test_a_penalty_is_its_closed_form(name, reuse):
    critic, due = Quadratic(), alone(name, reuse=reuse)
    seen = given(critic, on_real=due.shares_pass_at("real"), on_fake=due.shares_pass_at("fake"))
    value = value_of(due, seen)
    (gradient,) = torch.autograd.grad(value, critic.b)
    expected, expected_gradient = closed_form(name, critic, seen)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, expected_gradient.detach(), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", penalties.PENALTIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"], ids=["of the loss's graph", "computed anew"])
def test_augmentation_is_part_of_what_a_penalty_differentiates(name, precision):
    """Slopes are with respect to images before augmentation, out of the loss's graph and computed anew alike."""
    config = Config(
        run=RunConfig(dir="."),
        penalty=PenaltyConfig(name=name, weight=1.0),
        augment=AugmentConfig(policy="color,cutout"),
        train=TrainConfig(precision=precision),
    )
    critic, augment = Quadratic(), Augment(["color", "cutout"])
    rng = torch.Generator().manual_seed(2)
    numbers = {}

    def draw(stream, count):
        if stream not in numbers:
            numbers[stream] = torch.rand(6, count, dtype=torch.float64, generator=rng)
        return numbers[stream]

    real, fake = torch.randn(2, *SHAPE, dtype=torch.float64, generator=rng)
    batch = Batch(real=real, y=None, z=real, draw=draw, update=0, weight=1.0, shared=True, last=True)
    terms = Objective(config).discriminator(critic, batch, fake.clone(), plain_D=critic)
    share = draw("penalty", 1)[:, :, None, None]
    x, which = {
        "wgan_gp": (share * real + (1 - share) * fake, "penalty"),
        "r1": (real.clone(), "real"),
        "r2": (fake.clone(), "fake"),
    }[name]
    x.requires_grad_(True)
    (slope,) = torch.autograd.grad(critic(augment(x, draw, which)).sum(), x)
    norm = slope.flatten(1).norm(dim=1)
    expected = (norm - 1).square().mean() if name == "wgan_gp" else norm.square().mean() / 2
    torch.testing.assert_close(terms.logged["loss/penalty"], expected, rtol=1e-10, atol=0)


def test_a_critic_that_is_flat_can_be_differentiated():
    critic = Quadratic()
    critic.a.zero_()
    critic.b.data.zero_()
    (gradient,) = torch.autograd.grad(value_of(alone("wgan_gp"), given(critic)), critic.b)
    assert gradient.isfinite().all()


def test_a_lazy_penalty_weighs_the_same_on_the_whole():
    critic = Quadratic()
    seen = given(critic, on_real=True, on_fake=True)
    r1, r2 = (closed_form(name, critic, seen)[0].item() for name in ("r1", "r2"))
    eager = Penalties(PenaltyConfig(name="r1,r2", weight=3.0), reuse=True)
    lazy = Penalties(PenaltyConfig(name=["r1", "r2"], weight=3.0, every=4), reuse=True)
    assert [value_of(eager.due(update), seen).item() for update in range(3)] == pytest.approx([3 * (r1 + r2)] * 3)
    assert [value_of(lazy.due(update), seen).item() for update in range(5)] == pytest.approx(
        [12 * (r1 + r2), 0, 0, 0, 12 * (r1 + r2)]
    )
    assert [lazy.due(update).shares_pass_at("real") for update in range(5)] == [True, False, False, False, True]
    default = Penalties(PenaltyConfig(name="wgan_gp"), reuse=True)
    assert value_of(default.due(0), seen).item() == pytest.approx(10 * closed_form("wgan_gp", critic, seen)[0].item())


def under_bf16(path):
    """What the penalties are with a discriminator that Accelerate runs in bf16, and with one that it does not know."""
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 4, 1, 32, 32, generator=rng).unbind()
    share = torch.rand(4, 1, generator=rng)
    _, plain = build(
        ModelConfig(width=4, latent_dim=4, d_norm="spectral"), ImageSpec(image_size=32, channels=1), seed=0
    )
    _, wrapped = build(
        ModelConfig(width=4, latent_dim=4, d_norm="spectral"), ImageSpec(image_size=32, channels=1), seed=0
    )
    with Ranks(timeout=60) as ranks:
        ranks.join(precision="bf16", tf32=False)
        ranks.accelerator.prepare(wrapped)
        critic = without_autocast(wrapped)
        found = {"rounded": float((wrapped(real) - plain(real)).abs().max())}
        for name in penalties.PENALTIES:
            values = []
            for run, network in ((critic, wrapped), (plain, plain)):
                due = Penalties(PenaltyConfig(name=name), reuse=False).due(0)
                assert not (due.shares_pass_at("real") or due.shares_pass_at("fake"))
                logits = (network(real, None), network(fake, None))
                seen = Given(lambda x, _, run=run: run(x, None), lambda *_: share, real, logits[0], fake, logits[1])
                value = value_of(due, seen)
                value.backward()
                gradients = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
                network.zero_grad()
                values.append((value.detach(), *gradients))
            found[name] = [torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(*values, strict=True)]
        found["rounded after"] = float((wrapped(real) - plain(real)).abs().max())
    path.write_text(json.dumps(found))


def test_under_bf16_a_penalty_is_computed_in_float32(tmp_path):
    process = processes.Process(target=under_bf16, args=(tmp_path / "found.json",))
    process.start()
    process.join(120)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.pop("rounded") > 0  # the loss's own logits come out of bf16
    assert found.pop("rounded after") > 0
    assert all(all(same) and len(same) > 3 for same in found.values()), found


def test_a_penaltys_passes_do_not_round_to_tf32_on_a_gpu(tmp_path):
    """By the setting alone, which a CPU has, too; what it does on a GPU is not tried here."""
    for name, penalty, allowed in (("without", [], True), ("with", ["--penalty.name=r1"], False)):
        argv = [*TINY, "--train.steps=1", "--train.precision=bf16", "--model.d_norm=none", *penalty]
        setups = [functools.partial(note_tf32, tmp_path / name)]
        assert launch([*argv, f"--run.dir={tmp_path / f'run-{name}'}"], setups=setups) == [0]
        assert json.loads((tmp_path / name).read_text()) is allowed


def test_a_loss_and_its_penalty_have_one_gradient():
    """What the one backward pass computes is the sum of both gradients."""
    critic = Quadratic()
    seen = given(critic, on_real=True)
    loss = losses.build("non_saturating").discriminator(seen.real_logits, seen.fake_logits)
    (of_loss,) = torch.autograd.grad(loss, critic.b, retain_graph=True)
    both = loss + value_of(Due({"r1": 2.0}, True), seen)
    both.backward()
    torch.testing.assert_close(critic.b.grad, of_loss + 2 * closed_form("r1", critic, seen)[1].detach())
