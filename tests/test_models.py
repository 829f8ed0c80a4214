"""DCGAN is the textbook's."""

import pytest
import torch
from torch import nn

from distgan import models
from distgan.config import ModelConfig
from distgan.models import Shape, eval_mode, frozen


def layers(network):
    """Name, kind, channels, kernel, stride, padding of the layers with weights, and the kinds of the rest."""
    table = []
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            shape = (layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0], layer.padding[0])
            assert layer.bias is None
            table.append((name, type(layer).__name__, *shape))
        elif isinstance(layer, nn.BatchNorm2d):
            table.append((name, "BatchNorm2d", layer.num_features))
        elif not isinstance(layer, nn.Sequential) and name:
            table.append((name, type(layer).__name__))
    return table


def test_at_64_pixels_the_layers_are_the_textbook_ones():
    """PyTorch's DCGAN tutorial: nz 100, ngf = ndf = 64, nc 3; its last layer, a sigmoid, is in the loss here."""
    G, D = models.build(ModelConfig(), Shape(image_size=64, channels=3), seed=0)
    assert layers(G) == [
        ("main.0", "ConvTranspose2d", 100, 512, 4, 1, 0),
        ("main.1", "BatchNorm2d", 512),
        ("main.2", "ReLU"),
        ("main.3", "ConvTranspose2d", 512, 256, 4, 2, 1),
        ("main.4", "BatchNorm2d", 256),
        ("main.5", "ReLU"),
        ("main.6", "ConvTranspose2d", 256, 128, 4, 2, 1),
        ("main.7", "BatchNorm2d", 128),
        ("main.8", "ReLU"),
        ("main.9", "ConvTranspose2d", 128, 64, 4, 2, 1),
        ("main.10", "BatchNorm2d", 64),
        ("main.11", "ReLU"),
        ("main.12", "ConvTranspose2d", 64, 3, 4, 2, 1),
        ("main.13", "Tanh"),
    ]
    assert layers(D) == [
        ("main.0", "Conv2d", 3, 64, 4, 2, 1),
        ("main.1", "LeakyReLU"),
        ("main.2", "Conv2d", 64, 128, 4, 2, 1),
        ("main.3", "BatchNorm2d", 128),
        ("main.4", "LeakyReLU"),
        ("main.5", "Conv2d", 128, 256, 4, 2, 1),
        ("main.6", "BatchNorm2d", 256),
        ("main.7", "LeakyReLU"),
        ("main.8", "Conv2d", 256, 512, 4, 2, 1),
        ("main.9", "BatchNorm2d", 512),
        ("main.10", "LeakyReLU"),
        ("main.11", "Conv2d", 512, 1, 4, 1, 0),
    ]
    assert all(layer.negative_slope == 0.2 for layer in D.modules() if isinstance(layer, nn.LeakyReLU))
    # The tutorial's networks have these many parameters.
    assert sum(p.numel() for p in G.parameters()) == 3_576_704
    assert sum(p.numel() for p in D.parameters()) == 2_765_568


@pytest.mark.parametrize(
    ("image_size", "channels", "width", "latent_dim"),
    [(32, 1, 4, 8), (32, 3, 5, 3), (64, 1, 3, 7), (64, 3, 4, 100), (128, 3, 2, 9), (256, 1, 2, 6)],
)
def test_every_size_maps_latents_to_images_to_logits(image_size, channels, width, latent_dim):
    model, shape = ModelConfig(width=width, latent_dim=latent_dim), Shape(image_size=image_size, channels=channels)
    G, D = models.build(model, shape, seed=0)
    fake = G(torch.randn(2, latent_dim), None)
    assert fake.shape == (2, channels, image_size, image_size)
    assert fake.abs().max() <= 1
    assert D(fake, None).shape == (2,)
    narrowest = next(p.shape for p in D.parameters())
    assert narrowest == (width, channels, 4, 4)


def test_the_starting_weights_are_the_papers_and_functions_of_the_seed():
    shape = Shape(image_size=64, channels=3)
    for network, again, other in zip(*(models.build(ModelConfig(), shape, seed=s) for s in (1, 1, 2)), strict=True):
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name])
            if name.endswith("weight"):
                assert not torch.equal(tensor, other.state_dict()[name])
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                n = layer.weight.numel()
                assert abs(layer.weight.mean()) < 5 * 0.02 / n**0.5
                assert layer.weight.std().item() == pytest.approx(0.02, rel=5 / n**0.5)
            elif isinstance(layer, nn.BatchNorm2d):
                assert layer.weight.mean().item() == pytest.approx(1, abs=5 * 0.02 / len(layer.weight) ** 0.5)
                assert layer.weight.std().item() == pytest.approx(0.02, rel=5 / len(layer.weight) ** 0.5)
                assert (layer.bias == 0).all()


def test_samples_are_functions_of_seed_and_index_alone():
    G, _ = models.build(ModelConfig(width=3, latent_dim=5), Shape(image_size=32, channels=3), seed=0)
    for layer in G.modules():  # batch norm in training mode would tie the images of a batch together
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var.fill_(1e-3)
    G(torch.randn(4, 5))
    before = {name: tensor.clone() for name, tensor in G.state_dict().items()}
    torch.random.manual_seed(0)
    many = G.sample(150, seed=4)
    assert torch.equal(G.sample(10, seed=4), many[:10])
    assert torch.equal(G.sample(65, seed=4), many[:65])
    assert not torch.equal(G.sample(10, seed=5), many[:10])
    assert len(torch.unique(many, dim=0)) == 150
    assert many.float().std() > 1
    assert G.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in G.state_dict().items())
    drawn = torch.rand(1)
    torch.random.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)  # no global random state was touched


def test_frozen_and_eval_mode_put_everything_back():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    network[1].eval()
    network[0].bias.requires_grad_(False)
    x = torch.randn(2, 1, 5, 5, requires_grad=True)
    with frozen(network), eval_mode(network):
        assert not network.training
        network(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in network.parameters())
    assert [p.requires_grad for p in network.parameters()] == [True, False, True, True]
    assert (network.training, network[0].training, network[1].training) == (True, True, False)
