import pytest
import torch

from distgan import losses


def test_non_saturating_is_the_probabilities_formula():
    """In float64, where the formula on probabilities (Goodfellow et al. 2014) keeps enough digits to compare with."""
    rng = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(2, 64, dtype=torch.float64, generator=rng) * 3).requires_grad_(True)
    loss = losses.build("non_saturating")
    D_real, D_fake = torch.sigmoid(real), torch.sigmoid(fake)
    expected_D = -torch.log(D_real).mean() - torch.log(1 - D_fake).mean()
    expected_G = -torch.log(D_fake).mean()
    for ours, expected in [(loss.discriminator(real, fake), expected_D), (loss.generator(fake, None), expected_G)]:
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
        gradients = (torch.autograd.grad(x, fake, retain_graph=True)[0] for x in (ours, expected))
        torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-15)
    torch.testing.assert_close(loss.score(real), D_real.mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_at_least_float32_and_do_not_overflow(dtype):
    loss = losses.build("non_saturating")
    logits = torch.tensor([-200.0, 200.0], dtype=dtype)
    assert loss.discriminator(logits, logits).dtype == torch.float32
    assert loss.discriminator(logits, logits) == 200
    assert loss.generator(logits, None) == 100
