"""Losses against their papers' formulas, value and gradient, in float64."""

import pytest
import torch

from distgan.objective import losses


def log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


# (real logits, fake logits) -> the discriminator's and the generator's loss, as the papers write them.
FORMULAS = {
    "non_saturating": lambda r, f: (
        -(torch.log(torch.sigmoid(r)).mean() + torch.log(1 - torch.sigmoid(f)).mean()),
        -torch.log(torch.sigmoid(f)).mean(),
    ),
    "least_squares": lambda r, f: (((r - 1) ** 2).mean() / 2 + (f**2).mean() / 2, ((f - 1) ** 2).mean() / 2),
    "wasserstein": lambda r, f: (-(r.mean() - f.mean()), -f.mean()),
    "hinge": lambda r, f: (
        -torch.minimum(torch.zeros_like(r), r - 1).mean() - torch.minimum(torch.zeros_like(f), -f - 1).mean(),
        -f.mean(),
    ),
    "relativistic": lambda r, f: (-log_sigmoid(r - f).mean(), -log_sigmoid(f - r).mean()),
}


@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_loss_is_its_papers_formula(name):
    assert name in FORMULAS, "add its formula, as its paper writes it or by another way of computing it, to FORMULAS"
    rng = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(2, 64, dtype=torch.float64, generator=rng) * 3).unbind()
    real.requires_grad_()
    fake.requires_grad_()
    loss = losses.build(name)
    ours = loss.discriminator(real, fake), loss.generator(fake, real if loss.paired else None)
    for one, expected in zip(ours, FORMULAS[name](real, fake), strict=True):
        assert one.dtype == torch.float64
        assert one.shape == ()
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=0)
        gradients = (
            torch.autograd.grad(x, (real, fake), retain_graph=True, allow_unused=True) for x in (one, expected)
        )
        for a, b in zip(*gradients, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-15)
    score = torch.sigmoid(real).mean() if loss.probability else real.mean()
    torch.testing.assert_close(loss.score(real), score)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", losses.LOSSES)
def test_losses_are_at_least_float32_and_do_not_overflow(name, dtype):
    loss = losses.build(name)
    logits = torch.tensor([-200.0, 200.0], dtype=dtype)
    wide = logits.float()
    for one, expected in (
        (loss.discriminator(logits, logits.flip(0)), loss.discriminator(wide, wide.flip(0))),
        (loss.generator(logits, logits.flip(0)), loss.generator(wide, wide.flip(0))),
        (loss.score(logits), loss.score(wide)),
    ):
        assert one.dtype == torch.float32
        assert one.isfinite()
        assert one == expected  # 200 is a number of each of these types
