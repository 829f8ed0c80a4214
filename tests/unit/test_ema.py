import pytest
import torch
from torch import nn

from distgan import models
from distgan.ema import Average
from distgan.recipe import Config, EmaConfig, ModelConfig, RampConfig, RunConfig, TrainConfig


def averaging(ramp_to=None, **settings):
    """A recipe of 8 images in a step."""
    ramp = RampConfig(images=80, half_life=ramp_to) if ramp_to is not None else RampConfig()
    return Config(run=RunConfig(dir="run"), train=TrainConfig(batch_size=8), ema=EmaConfig(**settings), ramp=ramp)


def test_a_weights_share_halves_with_every_half_life():
    G, _ = models.build(ModelConfig(width=2, latent_dim=3), models.ImageSpec(image_size=32, channels=1), seed=0)
    average = Average(G, averaging(half_life=40, ramp=None))
    start = {name: tensor.clone() for name, tensor in average.generator.state_dict().items()}
    with torch.no_grad():
        for parameter in G.parameters():
            parameter.add_(1)
    for module in G.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(3)
            module.num_batches_tracked.fill_(8)
    for step in range(10):
        average.set(step)
        average.update(G)
    for name, tensor in average.generator.state_dict().items():  # 80 images: two half-lives, a quarter of the old left
        if name.endswith("num_batches_tracked"):
            assert tensor == 8
        else:
            expected = start[name] / 4 + G.state_dict()[name] * 3 / 4
            torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    assert not average.generator.training
    assert not any(p.requires_grad for p in average.generator.parameters())


@pytest.mark.parametrize(("half_life", "ramp", "share"), [(0, 0.05, 1.0), (1000, 0.5, 1 - 0.5 ** (8 / 4))])
def test_no_half_life_copies_and_the_ramp_bounds_it_early(half_life, ramp, share):
    G, _ = models.build(ModelConfig(width=2, latent_dim=3), models.ImageSpec(image_size=32, channels=1), seed=0)
    average = Average(G, averaging(half_life=half_life, ramp=ramp))
    before = average.generator.main[0].weight.clone()
    with torch.no_grad():
        G.main[0].weight.add_(1)
    average.set(0)
    average.update(G)
    torch.testing.assert_close(average.generator.main[0].weight, before + share, rtol=1e-5, atol=1e-6)


def shares(config, steps):
    G, _ = models.build(ModelConfig(width=2, latent_dim=3), models.ImageSpec(image_size=32, channels=1), seed=0)
    average, found = Average(G, config), []
    for step in steps:
        before = average.generator.main[0].weight.clone()
        with torch.no_grad():
            G.main[0].weight.add_(1)
        average.set(step)
        average.update(G)
        found.append(float(((average.generator.main[0].weight - before) / (G.main[0].weight - before)).mean()))
    return found, average


def test_until_its_start_the_average_is_a_copy():
    """BigGAN's: from step 1,000 on, 0.9999 of the old weights stay (Brock et al. 2019, section 3)."""
    found, _ = shares(averaging(half_life=55_447.7, ramp=None, start=1000), (0, 999, 1000, 5000))
    assert found == pytest.approx([1, 1, 1e-4, 1e-4], rel=1e-2)


def test_a_ramped_half_life_is_r3gans():
    """beta = 0.5^(batch / max(half-life, 1e-8)), half-life along half a cosine from 0 to its end over 80 images."""
    found, average = shares(averaging(ramp_to=40, half_life=0, ramp=None), (0, 5, 10, 50))
    assert found == pytest.approx([1, 1 - 0.5 ** (8 / 20), 1 - 0.5 ** (8 / 40), 1 - 0.5 ** (8 / 40)], rel=1e-4)
    assert average.now == {"ramp/half_life": 40}


@pytest.mark.parametrize("settings", [{"half_life": 0}, {"half_life": 40, "start": 1000}])
def test_a_copy_is_one_with_spectral_norm_too_and_an_average_has_vectors_of_its_own(settings):
    model = ModelConfig(architecture="biggan", width=2, latent_dim=4)
    G, _ = models.build(model, models.ImageSpec(image_size=32, channels=1), seed=0)
    average = Average(G, averaging(**settings))
    for step in (0, 1):
        with torch.no_grad():
            for parameter in G.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
        models.constrain(G)
        average.set(step)
        average.update(G)
    for name, tensor in G.state_dict().items():
        assert torch.equal(average.generator.state_dict()[name], tensor), name
    averaged = Average(G, averaging(half_life=40, ramp=None))
    with torch.no_grad():
        for parameter in G.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    averaged.set(0)
    averaged.update(G)
    for layer in averaged.generator.modules():
        if hasattr(layer, "parametrizations"):
            assert float(layer.parametrizations.weight[0].u.norm()) == pytest.approx(1, rel=1e-5)
