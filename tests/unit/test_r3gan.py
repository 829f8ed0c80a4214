"""R3GAN's networks: published sizes, and each part against a plain version."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d, leaky_relu

from distgan import models
from distgan.models import ImageSpec, r3gan
from distgan.models.r3gan import R3GANDiscriminator, R3GANGenerator
from distgan.recipe import Config, ModelConfig, RunConfig, TrainConfig, rules


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("size", "width", "classes", "published"),
    [
        (32, 768, 10, (20_781_952, 21_280_512)),
        (32, 768, 0, (20_732_160, 20_683_776)),
        (64, 768, 0, (22_429_824, 22_381_440)),
        (256, 768, 0, (23_057_952, 23_009_568)),
        (32, 1536, 1000, (82_914_304, 86_548_992)),
        (64, 1536, 1000, (103_570_432, 107_205_120)),
    ],
    ids=["cifar10", "stacked-mnist", "ffhq-64", "ffhq-256", "imagenet-32", "imagenet-64"],
)
def test_parameter_counts_are_the_published_ones(size, width, classes, published):
    """Table 9 of the paper prints them in millions: 20.78 and 21.28, 20.73 and 20.68, 22.43 and 22.38, 23.06 and 23.01,
    82.91 and 86.55, 103.57 and 107.21."""
    with torch.device("meta"):
        G = R3GANGenerator(size=(size, size), channels=3, width=width, latent_dim=64, class_counts=(1,) * classes)
        D = R3GANDiscriminator(size=(size, size), channels=3, width=width, classes=classes)
    assert (count(G), count(D)) == published


def built(width=16, classes=3, size=32):
    model = ModelConfig(architecture="r3gan", width=width, latent_dim=6, conditional=classes > 0)
    return models.build(model, ImageSpec(image_size=size, channels=3, class_counts=(5,) * classes), seed=0)


def test_a_block_is_the_plain_one():
    """x + W3 act(W2 * act(W1 x)), the middle one a 3x3 convolution of each group of 16 channels by itself."""
    block = r3gan._Block(16, group=16)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    x = torch.randn(2, 16, 5, 7)
    h = leaky_relu(torch.einsum("oi,nihw->nohw", block.conv1.weight[:, :, 0, 0], x) + block.bias1[:, None, None], 0.2)
    groups = [conv2d(h[:, i : i + 16], block.conv2.weight[i : i + 16], padding=1) for i in (0, 16)]
    h = leaky_relu(torch.cat(groups, 1) + block.bias2[:, None, None], 0.2)
    expected = x + torch.einsum("oi,nihw->nohw", block.conv3.weight[:, :, 0, 0], h)
    torch.testing.assert_close(block(x), expected)


def test_resampling_filters_by_1_3_3_1():
    """Written out: zeros between the pixels and around them, and the outer product of (1, 3, 3, 1) with itself."""
    taps = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
    x = np.random.default_rng(0).standard_normal((6, 4))
    spaced = np.zeros((12 + 4, 8 + 4))
    spaced[2:14:2, 2:10:2] = x
    doubled = np.array([[(4 * taps * spaced[i : i + 4, j : j + 4]).sum() for j in range(8)] for i in range(12)])
    padded = np.pad(x, 1)
    halved = np.array(
        [[(taps * padded[2 * i : 2 * i + 4, 2 * j : 2 * j + 4]).sum() for j in range(2)] for i in range(3)]
    )
    for stage, expected in (
        (r3gan._Stage(16, 16, group=16, up=True), doubled),
        (r3gan._Stage(16, 16, group=16, down=True), np.array(halved)),
    ):
        stage.blocks = torch.nn.Identity()
        given = torch.from_numpy(x)[None, None].expand(1, 16, -1, -1)
        torch.testing.assert_close(stage.double()(given)[0, 5], torch.from_numpy(expected))


def test_networks_begin_as_residuals_of_nothing_with_the_papers_deviations():
    """With the last convolution of each block at 0, G is a linear map resampled, and D a linear one."""
    G, D = built(width=64)
    L = 8
    gain = math.sqrt(2 / 1.04) * L**-0.25
    for network in (G, D):
        blocks = [layer for layer in network.modules() if isinstance(layer, r3gan._Block)]
        assert len(blocks) == L
        for block in blocks:
            assert block.conv1.weight.std().item() == pytest.approx(gain / math.sqrt(64), rel=0.05)
            assert block.conv2.weight.std().item() == pytest.approx(gain / math.sqrt(16 * 9), rel=0.05)
            assert not block.conv3.weight.any()
            assert not block.bias1.any()
    assert G.basis.std().item() == pytest.approx(1, rel=0.1)
    assert G.embedding.weight.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.6)
    assert D.embedding.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.3)
    assert D.basis.weight.std().item() == pytest.approx(1 / 4, rel=0.1)
    x = torch.randn(2, 3, 32, 32)
    y = torch.tensor([0, 2])
    torch.testing.assert_close(D(x[:1] + 2 * x[1:], y[:1]), D(x[:1], y[:1]) + 2 * D(x[1:], y[:1]))


def test_the_logit_is_the_projection_and_nothing_else_and_images_have_no_bound():
    G, D = built()
    images = G(100 * torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))
    assert images.abs().max() > 1
    assert G.sample(3).dtype == torch.uint8  # clamped
    y = torch.tensor([0, 1, 2, 0])
    logits = D(images, y)
    with torch.no_grad():
        features = D.last(D.basis(D.features(images)[-1]).flatten(1))
    torch.testing.assert_close(logits, (features * D.embedding.weight[y]).sum(1))
    D.embedding.weight.data[1] = 0
    assert D(images, y)[1] == 0
    shares = torch.eye(3)[y]
    torch.testing.assert_close(G(torch.ones(4, 6), shares), G(torch.ones(4, 6), y))


def test_in_bf16_the_stage_of_4x4_runs_in_full_precision():
    torch.set_default_dtype(torch.float32)
    G, D = built()
    seen = {}
    for name, network in (("G", G), ("D", D)):
        for i, stage in enumerate(network.stages):
            stage.blocks.register_forward_hook(lambda _, x, out, at=(name, i): seen.update({at: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        logits = D(G(torch.randn(2, 6), torch.tensor([0, 1])), torch.tensor([0, 1]))
    # A sum of bf16 and fp32 is fp32: of the blocks, the convolutions tell.
    assert seen[("G", 0)] == seen[("D", 3)] == torch.float32
    assert {seen[(name, i)] for name, i in seen if (name, i) not in (("G", 0), ("D", 3))} == {torch.bfloat16}
    assert logits.dtype == torch.float32


@pytest.mark.parametrize(("size", "width", "least"), [(32, 12, 8), (64, 24, 16), (256, 32, 64), (32, 776, 16)])
def test_a_width_that_makes_no_groups_is_refused(size, width, least):
    if width >= 768:
        width = 1544
    with pytest.raises(ValueError, match=rf"model\.width is {width}, but r3gan needs a multiple of {least} "):
        built(width=width, size=size)


def test_orthogonal_weights_and_fp16_are_refused():
    model = ModelConfig(architecture="r3gan", width=8, init="orthogonal")
    with pytest.raises(ValueError, match=r"model\.init is orthogonal, but r3gan has paper"):
        models.build(model, ImageSpec(image_size=32, channels=1), seed=0)
    half = Config(
        run=RunConfig(dir="run"), model=ModelConfig(architecture="r3gan"), train=TrainConfig(precision="fp16")
    )
    with pytest.raises(ValueError, match=r"train\.precision is fp16, but r3gan does not train in it"):
        rules.check_precision(half, fp16_works=models.fp16_works(half.model))
    rules.check_precision(half, fp16_works=models.fp16_works(ModelConfig()))
