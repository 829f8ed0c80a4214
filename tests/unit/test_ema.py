import pytest
import torch
from torch import nn

from distgan import models
from distgan.ema import Average
from distgan.recipe import ModelConfig


def test_a_weights_share_halves_with_every_half_life():
    G, _ = models.build(ModelConfig(width=2, latent_dim=3), models.ImageSpec(image_size=32, channels=1), seed=0)
    average = Average(G, half_life=40, ramp=1e9, images_per_step=8)  # the ramp never binds
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
    average = Average(G, half_life=half_life, ramp=ramp, images_per_step=8)
    before = average.generator.main[0].weight.clone()
    with torch.no_grad():
        G.main[0].weight.add_(1)
    average.set(0)
    average.update(G)
    torch.testing.assert_close(average.generator.main[0].weight, before + share, rtol=1e-5, atol=1e-6)
