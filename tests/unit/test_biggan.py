"""BigGAN's networks: published sizes, and each part against a plain version; truncation and standing statistics."""

import math

import pytest
import scipy.stats
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, conv2d, relu

from distgan import models
from distgan.models import CHUNK, ImageSpec, biggan, eval_mode
from distgan.models.biggan import BigGANDiscriminator, BigGANGenerator
from distgan.models.layers import _cut_off
from distgan.recipe import ModelConfig


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("size", "latent_dim", "classes", "published"),
    [(32, 80, 10, (9_416_196, 2_415_170)), (128, 120, 1000, (70_433_988, 87_982_370))],
)
def test_parameter_counts_are_the_published_ones(size, latent_dim, classes, published):
    """StudioGAN's log of CIFAR-10 (BigGAN-train-2021_01_15_14_48_48); google/compare_gan's resnet_biggan_test.py."""
    with torch.device("meta"):
        common = {"size": (size, size), "channels": 3, "width": 96}
        G = BigGANGenerator(**common, latent_dim=latent_dim, class_counts=(1,) * classes)
        D = BigGANDiscriminator(**common, classes=classes)
    assert tuple(sum(p.numel() for p in network.parameters()) for network in (G, D)) == published


def built(size=32, classes=3, width=2, latent_dim=28):
    model = ModelConfig(architecture="biggan", width=width, latent_dim=latent_dim, conditional=classes > 0)
    counts = (5, 1, 4)[:classes]
    return models.build(model, ImageSpec(image_size=size, channels=3, class_counts=counts), seed=0)


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize(
    ("size", "latent_dim", "attends", "last"), [(32, 28, 16, 8), (64, 20, 32, 4), (128, 18, 64, 4), (256, 14, 64, 4)]
)
def test_every_size_has_attention_where_the_layout_says(size, latent_dim, attends, last, classes):
    G, D = built(size, classes=classes, width=1, latent_dim=latent_dim)
    at = []
    for network in (G, D):
        network.attention.register_forward_hook(lambda _, x, out: at.append(out.shape[-1]))
    y = torch.tensor([0, 2]) if classes else None
    with torch.no_grad(), eval_mode(G):
        images = G(torch.randn(2, latent_dim), y)
        assert images.shape == (2, 3, size, size)
        assert D(images, y).shape == (2,)
        assert D.features(images)[-1].shape[-1] == last
    assert at == [attends, attends, attends]


def test_attention_is_the_plain_one_and_begins_as_nothing():
    """Place by place: softmax over the keys of the products, the values' mean, one more convolution."""
    attention = biggan._Attention(8)
    x = torch.randn(2, 8, 4, 6)
    torch.testing.assert_close(attention(x), x)
    attention.gamma.data.fill_(0.7)

    def halved(conv):
        h = conv2d(x, conv.weight)
        return torch.stack([h[:, :, i : i + 2, j : j + 2].amax((2, 3)) for i in (0, 2) for j in (0, 2, 4)], 2)

    keys, values, out = halved(attention.phi), halved(attention.g), torch.zeros(2, 4, 4, 6)
    queries = conv2d(x, attention.theta.weight)
    for n in range(2):
        for i in range(4):
            for j in range(6):
                weights = torch.stack([(queries[n, :, i, j] * keys[n, :, k]).sum() for k in range(6)]).exp()
                out[n, :, i, j] = (values[n] * weights / weights.sum()).sum(1)
    torch.testing.assert_close(attention(x), x + 0.7 * conv2d(out, attention.o.weight))


def test_a_conditioned_batch_norm_is_the_plain_one():
    norm = biggan._BatchNorm(5, 7)
    x, condition = 3 * torch.randn(6, 5, 4, 4) + 1, torch.randn(6, 7)
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    scale, shift = condition @ norm.scale.weight.T, condition @ norm.shift.weight.T
    expected = (1 + scale[:, :, None, None]) * (x - mean) / (var + 1e-4).sqrt() + shift[:, :, None, None]
    torch.testing.assert_close(norm(x, condition), expected)


def test_blocks_of_the_discriminator_are_the_plain_ones():
    """The shortcut takes the block's input before its activation."""
    for first, down, after in ((True, True, 6), (False, True, 6), (False, False, 4)):
        block = biggan._Down(4, after, first=first, down=down)
        x = torch.randn(2, 4, 6, 6)
        h = conv2d(x if first else relu(x), block.conv1.weight, block.conv1.bias, padding=1)
        h = conv2d(relu(h), block.conv2.weight, block.conv2.bias, padding=1)
        shortcut = x
        if block.shortcut is not None:
            shortcut = conv2d(x, block.shortcut.weight, block.shortcut.bias)
        expected = avg_pool2d(h, 2) + avg_pool2d(shortcut, 2) if down else h + shortcut
        torch.testing.assert_close(block(x), expected)


def test_each_part_of_the_latent_vector_enters_at_its_block():
    G, _ = built()
    maps = []
    for block in G.blocks:
        block.register_forward_hook(lambda _, x, out: maps.append(out.detach()))
    z, y = torch.randn(4, 28), torch.tensor([0, 1, 2, 2])
    with eval_mode(G):
        for part in range(4):
            maps.clear()
            changed = z.clone()
            changed[:, 7 * part : 7 * part + 7] += 1
            G(z, y), G(changed, y)
            same = [torch.equal(a, b) for a, b in zip(maps[:3], maps[3:], strict=True)]
            assert same == [i + 1 < part for i in range(3)]


def test_spectral_norm_is_on_all_weights_but_the_generators_embedding():
    G, D = built()
    for network, embedding in ((G, False), (D, True)):
        for name, layer in network.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                assert hasattr(layer, "parametrizations"), name
            if isinstance(layer, nn.Embedding):
                assert hasattr(layer, "parametrizations") == embedding, name
    before = {name: tensor.clone() for name, tensor in G.named_buffers() if name.endswith(".0.u")}
    assert before
    with torch.no_grad():
        for parameter in G.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    models.constrain(G)
    changed = [not torch.equal(tensor, before[name]) for name, tensor in G.named_buffers() if name in before]
    assert sum(changed) > len(changed) / 2  # vectors of one number stay 1


def test_a_latent_vector_that_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match=r"model\.latent_dim is 30, but biggan splits it into 4 equal parts"):
        built(latent_dim=30)


# Truncation and standing statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0.04, 0.5, 2.0])
def test_truncated_latents_have_the_truncated_normal_distribution_in_the_order_of_the_whole_one(at):
    probabilities = torch.linspace(0.001, 0.999, 200)
    z = torch.special.ndtri(probabilities)
    expected = scipy.stats.truncnorm(-at, at).ppf(probabilities.numpy())
    torch.testing.assert_close(_cut_off(z, at), torch.from_numpy(expected), rtol=1e-9, atol=1e-12)
    assert _cut_off(torch.tensor([-40.0, 40.0]), at).tolist() == pytest.approx([-at, at])
    torch.testing.assert_close(_cut_off(z, 30.0), z)


def test_a_truncated_generator_draws_from_truncated_latents_and_leaves_the_other_as_it_was():
    G, _ = built()
    drawn = []
    G.register_forward_pre_hook(lambda _, inputs: drawn.append(inputs[0]))
    whole = G.sample(64, seed=3)
    cut = G.truncated(0.1)
    assert torch.equal(cut.sample(10, seed=3), cut.sample(64, seed=3)[:10])
    assert drawn[-1].abs().max() <= 0.1
    torch.testing.assert_close(drawn[-1], _cut_off(drawn[0], 0.1))
    assert torch.equal(G.sample(64, seed=3), whole)
    assert not torch.equal(cut.sample(64, seed=3), whole)
    for wrong in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="the truncation is"):
            G.truncated(wrong)


def test_standing_statistics_are_the_means_of_those_of_batches_of_samples():
    G, _ = built()
    norms = [layer for layer in G.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.fill_(5)
    stood = G.standing(3)
    seen = []
    norms[0].register_forward_hook(lambda _, x, out: seen.append(x[0].detach()))
    G.train()
    for i in range(3):
        G(*G.inputs(i * CHUNK, seed=0, stream="standing"))
    ours = next(layer for layer in stood.modules() if isinstance(layer, nn.BatchNorm2d))
    torch.testing.assert_close(ours.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    torch.testing.assert_close(ours.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))
    assert ours.momentum == 0.1
    assert not torch.equal(stood.sample(4), G.sample(4))
    assert torch.equal(stood.sample(4), G.standing(3).sample(4))
